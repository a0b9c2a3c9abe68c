// TVM 0.27 warns on stderr for every library that it loads, whatever is in it.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <mutex>
#include <sstream>
#include <string>

namespace tvm_sparse {

// Holds the process's stderr back while it lives, and then passes on all but those warnings.
class Quiet {
 public:
  Quiet() : lock_(mutex()), held_(std::tmpfile()), stderr_(held_ ? dup(2) : -1) {
    std::fflush(stderr);
    if (stderr_ >= 0) dup2(fileno(held_), 2);
  }

  ~Quiet() {
    if (stderr_ >= 0) {
      std::fflush(stderr);
      dup2(stderr_, 2);
      close(stderr_);
      pass_on();
    }
    if (held_) std::fclose(held_);
  }

  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex instance;
    return instance;
  }

  void pass_on() {
    static const std::string chatter = "Warning: Scope Loaded:";
    std::string text, line;
    char part[4096];
    std::rewind(held_);
    while (const std::size_t count = std::fread(part, 1, sizeof part, held_)) text.append(part, count);
    std::istringstream lines(text);
    while (std::getline(lines, line)) {
      line.erase(line.find_last_not_of(" \r") + 1);
      const bool is_chatter =
          line.size() >= chatter.size() &&
          line.compare(line.size() - chatter.size(), chatter.size(), chatter) == 0;
      if (!is_chatter) std::fprintf(stderr, "%s\n", line.c_str());
    }
  }

  std::lock_guard<std::mutex> lock_;
  std::FILE* held_;
  int stderr_;
};

}  // namespace tvm_sparse
