// Arrays in and out, and the one kind of error: its message is one sentence for a person.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace tvm_sparse {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

using Shape = std::vector<std::int64_t>;

// An element type: NumPy's name, its code in .npy files, and DLPack's code and bits.
struct DType {
  const char* name;
  const char* descr;
  std::uint8_t code;
  std::uint8_t bits;
};

inline const std::vector<DType>& dtypes() {
  static const std::vector<DType> table = {
      {"float32", "<f4", 2, 32}, {"float16", "<f2", 2, 16}, {"int64", "<i8", 0, 64},
      {"int32", "<i4", 0, 32},   {"bool", "|b1", 6, 8},
  };
  return table;
}

inline const DType& dtype_named(const std::string& name) {
  for (const DType& dtype : dtypes())
    if (name == dtype.name) return dtype;
  throw Error("arrays of " + name + " are not read or written here: float32, float16, int64, int32 " +
              "and bool are");
}

// As NumPy writes it: (2, 3), (2,), ().
inline std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// Bytes of an array; a sentence where no memory could hold them.
inline std::size_t bytes_of(const Shape& shape, const DType& dtype) {
  std::size_t bytes = dtype.bits / 8;
  const std::size_t most = std::numeric_limits<std::ptrdiff_t>::max();
  bool is_empty = false;
  for (std::int64_t extent : shape) {
    if (extent < 0) throw Error("a shape has no negative size, as in " + text_of(shape));
    if (extent == 0) is_empty = true;
  }
  if (is_empty) return 0;
  for (std::int64_t extent : shape) {
    if (bytes > most / static_cast<std::size_t>(extent))
      throw Error("an array of shape " + text_of(shape) + " is larger than any memory");
    bytes *= static_cast<std::size_t>(extent);
  }
  return bytes;
}

// A C-contiguous array that owns its memory. Kernels read it in place: it starts at 64 bytes.
class Array {
 public:
  Array(const DType& dtype, Shape shape)
      : dtype_(&dtype), shape_(std::move(shape)), bytes_(bytes_of(shape_, dtype)) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes_ ? bytes_ : 64) != 0) throw std::bad_alloc();
    data_.reset(memory);
  }

  const DType& dtype() const { return *dtype_; }
  const Shape& shape() const { return shape_; }
  std::size_t bytes() const { return bytes_; }
  void* data() { return data_.get(); }
  const void* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  const DType* dtype_;
  Shape shape_;
  std::size_t bytes_;
  std::unique_ptr<void, Free> data_;
};

}  // namespace tvm_sparse
