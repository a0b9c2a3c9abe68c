// The scalar and vector types of CUDA source, and functions of numbers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

// A NaN wins where it comes first, as unwritten shared memory should: CUDA's own would drop it.
template <typename T>
static inline T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
static inline T min(T a, T b) {
  return b < a ? b : a;
}

namespace emulator {

template <typename To, typename From>
static inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct HalfFormat {
  static float value(uint16_t bits) { return static_cast<float>(bits_of<_Float16>(bits)); }
  static uint16_t bits(float value) { return bits_of<uint16_t>(static_cast<_Float16>(value)); }
};

struct BrainFormat {
  static float value(uint16_t bits) { return bits_of<float>(static_cast<uint32_t>(bits) << 16); }
  static uint16_t bits(float value) {
    uint32_t wide = bits_of<uint32_t>(value);
    if (value != value) return 0x7fff;
    // To the nearest, to even in the middle.
    return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
};

// A number of 16 bits. Arithmetic in float, rounded once more, rounds as if it were exact: float
// has more than twice the digits.
template <typename Format>
struct Sixteen {
  uint16_t bits;

  Sixteen() = default;
  explicit Sixteen(float value) : bits(Format::bits(value)) {}
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  explicit Sixteen(T value) : Sixteen(static_cast<float>(value)) {}
  operator float() const { return Format::value(bits); }

#define EMULATOR_OPERATOR(sign)                                  \
  friend Sixteen operator sign(Sixteen a, Sixteen b) {           \
    return Sixteen(static_cast<float>(a) sign static_cast<float>(b)); \
  }
  EMULATOR_OPERATOR(+)
  EMULATOR_OPERATOR(-)
  EMULATOR_OPERATOR(*)
  EMULATOR_OPERATOR(/)
#undef EMULATOR_OPERATOR
  friend Sixteen operator-(Sixteen a) { return Sixteen(-static_cast<float>(a)); }
};

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};
template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T x, y, z, w;
};

}  // namespace emulator

using half = emulator::Sixteen<emulator::HalfFormat>;
using nv_bfloat16 = emulator::Sixteen<emulator::BrainFormat>;
using __half = half;
using __nv_bfloat16 = nv_bfloat16;

#define EMULATOR_VECTORS(type, name)                                         \
  using name##2 = emulator::Two<type>;                                       \
  using name##4 = emulator::Four<type>;                                      \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }    \
  static inline name##4 make_##name##4(type x, type y, type z, type w) {     \
    return {x, y, z, w};                                                     \
  }
EMULATOR_VECTORS(signed char, char)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned int, uint)
EMULATOR_VECTORS(long long, longlong)
EMULATOR_VECTORS(unsigned long long, ulonglong)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
EMULATOR_VECTORS(half, half)
EMULATOR_VECTORS(nv_bfloat16, nv_bfloat16)
#undef EMULATOR_VECTORS
using __nv_bfloat162 = nv_bfloat162;

static inline half __float2half_rn(float x) { return half(x); }
static inline half __float2half(float x) { return half(x); }
static inline float __half2float(half x) { return x; }
static inline nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }
static inline nv_bfloat16 __float2bfloat16(float x) { return nv_bfloat16(x); }
static inline float __bfloat162float(nv_bfloat16 x) { return x; }
static inline unsigned __pack_half2(half x, half y) { return y.bits << 16 | x.bits; }
static inline unsigned __pack_nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) {
  return y.bits << 16 | x.bits;
}

#define EMULATOR_FUNCTION(name, wide)                             \
  template <typename Format>                                      \
  static inline emulator::Sixteen<Format> name(emulator::Sixteen<Format> x) { \
    return emulator::Sixteen<Format>(wide(static_cast<float>(x))); \
  }
EMULATOR_FUNCTION(__habs, std::fabs)
EMULATOR_FUNCTION(hexp, std::exp)
EMULATOR_FUNCTION(hlog, std::log)
EMULATOR_FUNCTION(hsqrt, std::sqrt)
EMULATOR_FUNCTION(htanh, std::tanh)
EMULATOR_FUNCTION(herf, std::erf)
#undef EMULATOR_FUNCTION

// glibc declares these names, and has no such functions.
#define __expf expf
#define __tanhf tanhf

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
