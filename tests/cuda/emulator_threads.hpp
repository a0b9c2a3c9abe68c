// Fibres for the threads of a block, the queue of those that can go on, and the barrier.
#pragma once
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <ucontext.h>

struct Index3 {
  int x, y, z;
};
static Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 64 << 10;
constexpr int kLanes = 32;
// What the scheduler is woken with.
constexpr int kFinished = 1, kFault = 2;

struct Fibre {
  // A context starts a fibre. Later switches save registers only: swapcontext makes system calls.
  ucontext_t context;
  jmp_buf state;
  Index3 thread;
  const char* place;  // where it waits
  int line;
};

static std::vector<Fibre> fibres;
static std::unique_ptr<char[]> stacks;
static jmp_buf scheduler;
static void (*kernel)(void);
static size_t current, running;
// A ring: no fibre is in it twice.
static std::vector<size_t> ready;
static size_t first_ready, count_ready;
static std::vector<size_t> at_barrier;
static void (*at_phase_end)(void);
static char message[1024];

[[noreturn]] static void fault(const char* format, ...) {
  const Index3 &b = blockIdx, &t = threadIdx;
  int used = snprintf(message, sizeof message, "block (%d, %d, %d), thread (%d, %d, %d): ", b.x,
                      b.y, b.z, t.x, t.y, t.z);
  va_list values;
  va_start(values, format);
  vsnprintf(message + used, sizeof message - used, format, values);
  va_end(values);
  _longjmp(scheduler, kFault);
}

static void make_ready(size_t number) {
  ready[(first_ready + count_ready++) % ready.size()] = number;
}

[[noreturn]] static void deadlock() {
  char text[800] = "";
  size_t used = 0;
  const Fibre* told = nullptr;
  for (const Fibre& fibre : fibres) {
    if (!fibre.place || (told && told->place == fibre.place && told->line == fibre.line)) continue;
    told = &fibre;
    const Index3& t = fibre.thread;
    used += snprintf(text + used, sizeof text - used, "; (%d, %d, %d) in %s, line %d", t.x, t.y,
                     t.z, fibre.place, fibre.line);
    if (used > sizeof text - 100) break;
  }
  fault("threads wait for others that never come%s", text);
}

[[noreturn]] static void resume_next() {
  if (count_ready == 0) {
    if (running == 0) _longjmp(scheduler, kFinished);
    deadlock();
  }
  current = ready[first_ready];
  first_ready = (first_ready + 1) % ready.size();
  --count_ready;
  threadIdx = fibres[current].thread;
  _longjmp(fibres[current].state, 1);
}

// Lets others run until somebody makes this fibre ready again.
__attribute__((noinline)) static void wait(const char* place, int line) {
  fibres[current].place = place;
  fibres[current].line = line;
  if (_setjmp(fibres[current].state) == 0) resume_next();
  fibres[current].place = nullptr;
}

static void release_barrier() {
  if (at_phase_end) at_phase_end();
  for (size_t number : at_barrier) make_ready(number);
  at_barrier.clear();
}

static void barrier(int line) {
  if (at_barrier.size() + 1 == running) return release_barrier();
  at_barrier.push_back(current);
  wait("__syncthreads", line);
}

// A thread that returned is not waited for.
static void leave() {
  --running;
  if (running && at_barrier.size() == running) release_barrier();
}

static void enter() {
  for (;;) {
    wait(nullptr, 0);
    kernel();
    leave();
  }
}

// Brings a new fibre to where it waits for its first block.
static void start(size_t number) {
  Fibre& fibre = fibres[number];
  int x = static_cast<int>(number) % blockDim.x, rest = static_cast<int>(number) / blockDim.x;
  fibre.thread = {x, rest % blockDim.y, rest / blockDim.y};
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = stacks.get() + number * kStack;
  fibre.context.uc_stack.ss_size = kStack;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, enter, 0);
  current = number;
  if (_setjmp(scheduler) == 0) setcontext(&fibre.context);
}

static void start_threads() {
  size_t count = static_cast<size_t>(blockDim.x) * blockDim.y * blockDim.z;
  fibres.assign(count, Fibre());
  ready.assign(count, 0);
  stacks.reset(new char[count * kStack]);
  running = first_ready = count_ready = 0;
  at_barrier.clear();
  for (size_t number = 0; number < count; ++number) start(number);
}

static int run_threads() {
  running = fibres.size();
  for (size_t number = 0; number < fibres.size(); ++number) make_ready(number);
  int how = _setjmp(scheduler);
  if (how == 0) resume_next();
  return how;
}

}  // namespace emulator

#define __syncthreads() emulator::barrier(__LINE__)
