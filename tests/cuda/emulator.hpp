// Runs CUDA source on the host: every thread of a block is a fibre, barriers switch between them.
//
// A fibre runs until it waits for others. At a barrier it waits until every fibre of its block has
// come as far; in a warp operation, until the other lanes have. Dynamic shared memory is filled
// with NaN before each block, so that what is read before it was written shows in the result.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__
#define __align__(n) alignas(n)
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short

struct Index3 {
  int x, y, z;
};
static Index3 threadIdx, blockIdx, blockDim, gridDim;

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};
template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T x, y, z, w;
};
using float2 = Two<float>;
using float4 = Four<float>;
using int2 = Two<int>;
using int4 = Four<int>;
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
// glibc declares these names, and has no such functions.
#define __expf expf
#define __tanhf tanhf

namespace emulator {

constexpr size_t kStack = 64 << 10;
constexpr size_t kShared = 256 << 10;

struct Fibre {
  ucontext_t context;
  Index3 thread;
  long arrivals;  // barriers that it has reached
  bool done;
};

static std::vector<Fibre> fibres;
static std::vector<char> stacks;
static ucontext_t scheduler;
static size_t current;
alignas(64) static unsigned char shared_memory[kShared];
static void (*kernel)(void);

static void wait() {
  swapcontext(&fibres[current].context, &scheduler);
  threadIdx = fibres[current].thread;
}

// Waits until all fibres of the block that still run have come to as many barriers.
static void barrier() {
  long mine = ++fibres[current].arrivals;
  for (;;) {
    bool all = true;
    for (const Fibre& other : fibres) all = all && (other.done || other.arrivals >= mine);
    if (all) return;
    wait();
  }
}

static void enter() {
  kernel();
  fibres[current].done = true;
  swapcontext(&fibres[current].context, &scheduler);
}

static void start(size_t number) {
  Fibre& fibre = fibres[number];
  int x = static_cast<int>(number) % blockDim.x, rest = static_cast<int>(number) / blockDim.x;
  fibre.thread = {x, rest % blockDim.y, rest / blockDim.y};
  fibre.arrivals = 0;
  fibre.done = false;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = stacks.data() + number * kStack;
  fibre.context.uc_stack.ss_size = kStack;
  fibre.context.uc_link = &scheduler;
  makecontext(&fibre.context, enter, 0);
}

static void run_block() {
  std::memset(shared_memory, 0xff, kShared);
  for (size_t number = 0; number < fibres.size(); ++number) start(number);
  for (bool running = true; running;) {
    running = false;
    for (size_t number = 0; number < fibres.size(); ++number) {
      if (fibres[number].done) continue;
      current = number;
      threadIdx = fibres[number].thread;
      swapcontext(&scheduler, &fibres[number].context);
      running = running || !fibres[number].done;
    }
  }
}

static void run(const int* grid, const int* block, void (*body)(void)) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  kernel = body;
  size_t count = static_cast<size_t>(block[0]) * block[1] * block[2];
  fibres.resize(count);
  stacks.resize(count * kStack);
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
}

}  // namespace emulator

static inline void __syncthreads() { emulator::barrier(); }
