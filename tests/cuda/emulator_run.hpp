// Runs a kernel: block after block.
#pragma once

namespace emulator {

// What the caller asks for; the same structure stands in emulator.py.
struct Launch {
  int grid[3], block[3];
  int shared_bytes, copies_are_late, counting;
};

// Dynamic shared memory is full of NaN, so that what was never written shows in the result.
static int run_block() {
  std::memset(shared_memory, 0xff, shared_bytes);
  start_warps();
  start_copies();
  int how = run_threads();
  if (counting && how == kFinished) count_accesses();
  return how;
}

static int run_grid() {
  for (int z = 0; z < gridDim.z; ++z)
    for (int y = 0; y < gridDim.y; ++y)
      for (int x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        if (run_block() != kFinished) return 1;
      }
  return 0;
}

static int run(const Launch& launch, void (*body)(void)) {
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  shared_bytes = launch.shared_bytes;
  copies_are_late = launch.copies_are_late;
  counting = launch.counting;
  at_phase_end = counting ? count_accesses : nullptr;
  kernel = body;
  sites.clear();
  start_threads();
  int failed = run_grid();
  stacks.reset();
  return failed;
}

}  // namespace emulator

extern "C" const char* emulator_message() { return emulator::message; }

extern "C" void emulator_traffic(int site, long* traffic) {
  bool known = site < static_cast<int>(emulator::sites.size());
  traffic[0] = known ? emulator::sites[site].wavefronts : 0;
  traffic[1] = known ? emulator::sites[site].ideal : 0;
}
