// .npy files, the ones of numpy.save: C order, little endian, of the types in array.hpp.
#pragma once

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "array.hpp"

namespace tvm_sparse {
namespace npy {

inline constexpr char kMagic[] = "\x93NUMPY";
inline constexpr std::size_t kMagicBytes = 6, kMostHeaderBytes = 1 << 16;

// Reads the header's dictionary: three keys, in any order, each with a value of its own kind.
class Header {
 public:
  explicit Header(const std::string& text) : text_(text) { read(); }

  std::string descr;
  bool is_fortran = false;
  Shape shape;

 private:
  void read() {
    expect('{');
    bool seen[3] = {false, false, false};
    while (!accept('}')) {
      const std::string key = quoted();
      expect(':');
      if (key == "descr") {
        descr = quoted();
        seen[0] = true;
      } else if (key == "fortran_order") {
        is_fortran = truth();
        seen[1] = true;
      } else if (key == "shape") {
        shape = extents();
        seen[2] = true;
      } else {
        fail();
      }
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    skip();
    if (at_ != text_.size() || !seen[0] || !seen[1] || !seen[2]) fail();
  }

  [[noreturn]] static void fail() { throw Error("its header is none that NumPy writes"); }

  void skip() {
    while (at_ < text_.size() && std::strchr(" \t\n", text_[at_]) && text_[at_]) ++at_;
  }

  bool accept(char wanted) {
    skip();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char wanted) {
    if (!accept(wanted)) fail();
  }

  std::string quoted() {
    expect('\'');
    const std::size_t end = text_.find('\'', at_);
    if (end == std::string::npos) fail();
    const std::string inner = text_.substr(at_, end - at_);
    at_ = end + 1;
    return inner;
  }

  bool truth() {
    skip();
    for (const char* word : {"True", "False"}) {
      if (text_.compare(at_, std::strlen(word), word) == 0) {
        at_ += std::strlen(word);
        return word[0] == 'T';
      }
    }
    fail();
  }

  Shape extents() {
    Shape found;
    expect('(');
    while (!accept(')')) {
      found.push_back(number());
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
    return found;
  }

  std::int64_t number() {
    skip();
    std::int64_t value = 0;
    const std::size_t start = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const int digit = text_[at_] - '0';
      if (value > (std::numeric_limits<std::int64_t>::max() - digit) / 10) fail();
      value = 10 * value + digit;
    }
    if (at_ == start) fail();
    return value;
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

inline std::string read_exactly(std::istream& stream, std::size_t count) {
  std::string bytes(count, '\0');
  stream.read(&bytes[0], static_cast<std::streamsize>(count));
  if (static_cast<std::size_t>(stream.gcount()) != count) throw Error("it is cut off");
  return bytes;
}

// The text of the header, whose length stands before it: two bytes in version 1, four later.
inline std::string header_text(std::istream& stream) {
  if (read_exactly(stream, kMagicBytes) != kMagic) throw Error("it is not a .npy file");
  const std::string version = read_exactly(stream, 2);
  if (version[0] < 1 || version[0] > 3 || version[1] != 0)
    throw Error("it has an unknown version of the format");
  const std::string field = read_exactly(stream, version[0] == 1 ? 2 : 4);
  std::size_t length = 0;
  for (std::size_t i = field.size(); i-- > 0;)
    length = length << 8 | static_cast<unsigned char>(field[i]);
  if (length > kMostHeaderBytes) throw Error("its header is none that NumPy writes");
  return read_exactly(stream, length);
}

// What a file says, as it can be shown: bytes that are no plain characters are question marks.
inline std::string printable(std::string text) {
  for (char& byte : text)
    if (byte < ' ' || byte > '~') byte = '?';
  return text;
}

inline const DType& dtype_of(const Header& header) {
  for (const DType& dtype : dtypes())
    if (header.descr == dtype.descr) return dtype;
  throw Error("it holds '" + printable(header.descr) + "': float32, float16, int64, int32 and bool are read, " +
              "little endian");
}

inline Array read_from(std::istream& stream) {
  stream.seekg(0, std::ios::end);
  const std::streamoff size = stream.tellg();
  stream.seekg(0);
  const std::string text = header_text(stream);
  const Header header(text);
  const DType& dtype = dtype_of(header);
  if (header.is_fortran && header.shape.size() > 1)
    throw Error("it is in Fortran's order: save numpy.ascontiguousarray of the array");
  // Before memory is taken for them: a few bytes can announce any shape.
  const std::size_t bytes = bytes_of(header.shape, dtype);
  const std::size_t left = static_cast<std::size_t>(size - stream.tellg());
  if (left < bytes) throw Error("it is cut off");
  if (left > bytes) throw Error("it holds more than the array of its header");
  Array array(dtype, header.shape);
  stream.read(static_cast<char*>(array.data()), static_cast<std::streamsize>(bytes));
  if (static_cast<std::size_t>(stream.gcount()) != bytes) throw Error("it is cut off");
  if (dtype.code == 6) {
    // Any other byte is undefined where a bool is read.
    for (std::size_t i = 0; i < bytes; ++i)
      if (static_cast<const unsigned char*>(array.data())[i] > 1)
        throw Error("it holds other numbers than 0 and 1 as bool");
  }
  return array;
}

}  // namespace npy

inline Array read_npy(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw Error("cannot read '" + path + "': " + std::strerror(errno));
  try {
    return npy::read_from(stream);
  } catch (const Error& error) {
    throw Error("cannot read '" + path + "': " + error.what());
  }
}

inline void write_npy(const std::string& path, const Array& array) {
  std::string text = "{'descr': '" + std::string(array.dtype().descr) +
                     "', 'fortran_order': False, 'shape': " + text_of(array.shape()) + ", }";
  // What follows the header starts at a multiple of 64 bytes.
  const std::size_t before = npy::kMagicBytes + 4, used = before + text.size() + 1;
  text += std::string((64 - used % 64) % 64, ' ') + "\n";
  const char version_and_length[] = {1, 0, static_cast<char>(text.size() & 255),
                                     static_cast<char>(text.size() >> 8)};
  std::ofstream stream(path, std::ios::binary | std::ios::trunc);
  stream.write(npy::kMagic, npy::kMagicBytes).write(version_and_length, 4);
  stream << text;
  stream.write(static_cast<const char*>(array.data()), static_cast<std::streamsize>(array.bytes()));
  stream.close();
  if (!stream) throw Error("cannot write '" + path + "': " + std::strerror(errno));
}

}  // namespace tvm_sparse
