// JSON as package manifests use it: read whole, and looked into by key.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "array.hpp"

namespace tvm_sparse {

class Json {
 public:
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  static Json parse(const std::string& text);

  Kind kind() const { return kind_; }
  bool has(const std::string& key) const { return fields_.count(key) != 0; }

  // Each of these refuses another kind, with the name of the field.
  const Json& at(const std::string& key) const {
    need(Kind::kObject);
    const auto found = fields_.find(key);
    if (found == fields_.end()) throw Error("it lacks '" + key + "'");
    return found->second;
  }
  const std::string& string() const { return need(Kind::kString).text_; }
  const std::vector<Json>& array() const { return need(Kind::kArray).items_; }
  const std::map<std::string, Json>& object() const { return need(Kind::kObject).fields_; }
  std::int64_t integer() const {
    need(Kind::kNumber);
    char* end = nullptr;
    errno = 0;
    const long long value = std::strtoll(text_.c_str(), &end, 10);
    if (errno || *end) throw Error("'" + text_ + "' is no whole number of 64 bits");
    return value;
  }

 private:
  friend class JsonReader;
  const Json& need(Kind kind) const {
    if (kind_ != kind) throw Error("a field of it is of the wrong kind");
    return *this;
  }

  Kind kind_ = Kind::kNull;
  bool truth_ = false;
  std::string text_;  // of a string, or the digits of a number
  std::vector<Json> items_;
  std::map<std::string, Json> fields_;
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json read() {
    Json value = read_value(0);
    skip();
    if (at_ != text_.size()) fail();
    return value;
  }

 private:
  static constexpr int kDeepest = 64;

  [[noreturn]] void fail() const {
    throw Error("it is not valid JSON, at byte " + std::to_string(at_));
  }

  void skip() {
    while (at_ < text_.size() && text_[at_] && std::strchr(" \t\r\n", text_[at_])) ++at_;
  }

  bool accept(char wanted) {
    skip();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  bool accept_word(const char* word) {
    if (text_.compare(at_, std::strlen(word), word) != 0) return false;
    at_ += std::strlen(word);
    return true;
  }

  Json read_value(int depth) {
    if (depth > kDeepest) fail();
    Json value;
    skip();
    if (at_ >= text_.size()) fail();
    if (text_[at_] == '"') {
      value.kind_ = Json::Kind::kString;
      value.text_ = read_string();
    } else if (accept('[')) {
      value.kind_ = Json::Kind::kArray;
      read_items(&value, depth);
    } else if (accept('{')) {
      value.kind_ = Json::Kind::kObject;
      read_fields(&value, depth);
    } else if (accept_word("null")) {
    } else if (accept_word("true")) {
      value.kind_ = Json::Kind::kBool;
      value.truth_ = true;
    } else if (accept_word("false")) {
      value.kind_ = Json::Kind::kBool;
    } else {
      value.kind_ = Json::Kind::kNumber;
      value.text_ = read_number();
    }
    return value;
  }

  void read_items(Json* value, int depth) {
    if (accept(']')) return;
    do {
      value->items_.push_back(read_value(depth + 1));
    } while (accept(','));
    if (!accept(']')) fail();
  }

  void read_fields(Json* value, int depth) {
    if (accept('}')) return;
    do {
      skip();
      std::string key = read_string();
      if (!accept(':')) fail();
      value->fields_[std::move(key)] = read_value(depth + 1);
    } while (accept(','));
    if (!accept('}')) fail();
  }

  std::string read_number() {
    const std::size_t start = at_;
    while (at_ < text_.size() && text_[at_] && std::strchr("+-.eE0123456789", text_[at_])) ++at_;
    if (at_ == start) fail();
    return text_.substr(start, at_ - start);
  }

  std::string read_string() {
    if (at_ >= text_.size() || text_[at_] != '"') fail();
    ++at_;
    std::string result;
    while (true) {
      if (at_ >= text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20) fail();
      const char next = text_[at_++];
      if (next == '"') return result;
      if (next == '\\')
        read_escape(&result);
      else
        result += next;
    }
  }

  void read_escape(std::string* result) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    if (at_ >= text_.size()) fail();
    const char name = text_[at_++];
    if (name == 'u') {
      append_utf8(read_code_point(), result);
      return;
    }
    const char* found = name ? std::strchr(names, name) : nullptr;
    if (!found) fail();
    *result += values[found - names];
  }

  std::uint32_t read_code_point() {
    const std::uint32_t first = read_hex();
    if (first < 0xD800 || first > 0xDFFF) return first;
    // Characters beyond 16 bits are written as two halves.
    if (first > 0xDBFF || !accept_word("\\u")) fail();
    const std::uint32_t second = read_hex();
    if (second < 0xDC00 || second > 0xDFFF) fail();
    return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
  }

  std::uint32_t read_hex() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      static const char digits[] = "0123456789abcdef";
      if (at_ >= text_.size()) fail();
      const char* found = text_[at_] ? std::strchr(digits, text_[at_] | 0x20) : nullptr;
      if (!found) fail();
      value = value << 4 | static_cast<std::uint32_t>(found - digits);
      ++at_;
    }
    return value;
  }

  static void append_utf8(std::uint32_t point, std::string* result) {
    if (point < 0x80) {
      *result += static_cast<char>(point);
      return;
    }
    const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    static const int lead[] = {0, 0xC0, 0xE0, 0xF0};
    *result += static_cast<char>(lead[more] | point >> (6 * more));
    for (int i = more - 1; i >= 0; --i)
      *result += static_cast<char>(0x80 | (point >> (6 * i) & 0x3F));
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

inline Json Json::parse(const std::string& text) { return JsonReader(text).read(); }

}  // namespace tvm_sparse
