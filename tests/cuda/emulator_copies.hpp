// Asynchronous copies from global to shared memory (cp.async).
//
// The hardware may write as early as a copy is started, and as late as its group is waited for. A
// kernel must be right either way.
#pragma once

namespace emulator {

struct Copy {
  unsigned char* to;
  int size;
  unsigned char bytes[16];
};

struct Copies {
  std::vector<Copy> started;              // since the last group was made
  std::vector<std::vector<Copy>> groups;  // oldest first
};
static std::vector<Copies> copies;  // of every thread
static bool copies_are_late;

static void start_copies() { copies.assign(fibres.size(), Copies()); }

static void copy_async(Address to, const void* from, int size, bool is_read) {
  access_shared(to.at, size, to.site);
  if (is_read && reinterpret_cast<uintptr_t>(from) % size)
    fault("a copy of %d bytes from a misaligned address", size);
  Copy copy = {to.at, size, {}};
  if (is_read) std::memcpy(copy.bytes, from, size);
  if (copies_are_late)
    copies[current].started.push_back(copy);
  else
    std::memcpy(to.at, copy.bytes, size);
}

static void commit_copies() {
  Copies& mine = copies[current];
  mine.groups.push_back(std::move(mine.started));
  mine.started.clear();
}

static void wait_for_copies(size_t pending) {
  auto& groups = copies[current].groups;
  size_t done = groups.size() > pending ? groups.size() - pending : 0;
  for (size_t group = 0; group < done; ++group)
    for (const Copy& copy : groups[group]) std::memcpy(copy.to, copy.bytes, copy.size);
  groups.erase(groups.begin(), groups.begin() + done);
}

}  // namespace emulator

#define sparse_copy_async_4(to, from) emulator::copy_async(to, from, 4, true)
#define sparse_copy_async_8(to, from) emulator::copy_async(to, from, 8, true)
#define sparse_copy_async_16(to, from) emulator::copy_async(to, from, 16, true)
#define sparse_copy_async_4_if(to, from, is_read) emulator::copy_async(to, from, 4, is_read)
#define sparse_copy_async_8_if(to, from, is_read) emulator::copy_async(to, from, 8, is_read)
#define sparse_copy_async_16_if(to, from, is_read) emulator::copy_async(to, from, 16, is_read)
#define sparse_commit_copies() emulator::commit_copies()
