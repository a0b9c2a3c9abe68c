// What one core can do at most, and how to begin with cold caches.
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vector.h"

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// The compiler has to hold the vector in a register here, and knows nothing about it afterwards.
inline void touch(Vector& v) { asm volatile("" : "+v"(v)); }

// More independent sums than latency (4 or 5 cycles) times units (2).
constexpr int kSums = 12;

constexpr size_t kLine = 64;

}  // namespace

extern "C" {

// Multiply-adds between registers only.
double limit_fma_gflops() {
  Vector sum[kSums], a = broadcast(1.0f), b = broadcast(1e-9f);
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s) sum[s] = zero();
  constexpr int kTurns = 200000;
  double best = 1e9;
  for (int repeat = 0; repeat < 20; ++repeat) {
    touch(a), touch(b);
    const double start = now();
    for (int i = 0; i < kTurns; ++i) {
#pragma GCC unroll 16
      for (int s = 0; s < kSums; ++s) {
        Vector next = multiply_add(a, b, sum[s]);
        touch(next);
        sum[s] = next;
      }
    }
    best = std::min(best, now() - start);
  }
  return 2.0 * LANES * kSums * kTurns / best * 1e-9;
}

// Reads the same `bytes` (a multiple of 1 KiB) again and again by whole vectors.
double limit_read_gbytes(size_t bytes) {
  float* data = (float*)aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  memset(data, 1, bytes);
  const size_t floats = bytes / 4;
  const int passes = std::max<size_t>(1, (8u << 20) / bytes);
  double best = 1e9;
  for (int repeat = 0; repeat < 12; ++repeat) {
    const double start = now();
    for (int pass = 0; pass < passes; ++pass)
      for (size_t i = 0; i < floats; i += 16 * LANES) {
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          Vector v = load(data + i + j * LANES);
          touch(v);
        }
      }
    best = std::min(best, now() - start);
  }
  free(data);
  return (double)bytes * passes / best * 1e-9;
}

// Drops a buffer from all caches.
void flush_buffer(const char* data, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kLine) _mm_clflush(data + i);
  if (bytes) _mm_clflush(data + bytes - 1);
  _mm_mfence();
}

// Reads a buffer larger than the caches, so that it takes the place of whatever they held.
uint64_t walk(const char* data, size_t bytes) {
  uint64_t sum = 0;
  for (size_t i = 0; i < bytes; i += kLine) sum += *(const volatile uint64_t*)(data + i);
  return sum;
}

// What a call costs that does nothing.
void nothing() {}
}
