// Shared memory: every access is checked, and counted where that is asked for.
//
// The generated text's pointers into shared memory are replaced by `Reading` and `Writing`, which
// know their place in the text, the "site".
#pragma once
#include <algorithm>

namespace emulator {

constexpr size_t kShared = 256 << 10;

alignas(1024) static unsigned char shared_memory[kShared];
static size_t shared_bytes;  // what the launch asks for
static bool counting;

// One instruction of a warp: the lanes that came to it, and their addresses.
struct Instruction {
  uint32_t lanes;
  uint32_t at[kLanes];
};

struct Site {
  uint32_t bytes;
  std::vector<std::vector<Instruction>> by_warp;  // since the last barrier, by visits
  std::vector<uint32_t> visits;                   // of every thread since the last barrier
  long wavefronts, ideal;
};
static std::vector<Site> sites;

// Starts a thread's next visit of a site, and returns what its warp does there.
static Instruction& visit(int number, size_t thread) {
  if (number >= static_cast<int>(sites.size())) sites.resize(number + 1);
  Site& site = sites[number];
  site.visits.resize(fibres.size());
  site.by_warp.resize((fibres.size() + kLanes - 1) / kLanes);
  auto& instructions = site.by_warp[thread / kLanes];
  size_t number_of_visit = site.visits[thread]++;
  if (number_of_visit >= instructions.size()) instructions.resize(number_of_visit + 1);
  return instructions[number_of_visit];
}

static void note(int number, size_t thread, uint32_t at, uint32_t bytes) {
  Instruction& instruction = visit(number, thread);
  sites[number].bytes = bytes;
  instruction.lanes |= 1u << thread % kLanes;
  instruction.at[thread % kLanes] = at;
}

// Counts what some lanes access together: 32 banks of 4 bytes, a word for all lanes at once.
static void count_phase(Site& site, const Instruction& instruction, int begin, int end,
                        uint32_t offset, uint32_t bytes) {
  std::vector<uint32_t> words;
  for (int lane = begin; lane < end; ++lane)
    for (uint32_t byte = 0; byte < bytes && instruction.lanes >> lane & 1; byte += 4)
      words.push_back((instruction.at[lane] + offset + byte) / 4);
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  int in_bank[32] = {};
  for (uint32_t word : words) ++in_bank[word % 32];
  site.wavefronts += *std::max_element(in_bank, in_bank + 32);
  site.ideal += (words.size() + 31) / 32;
}

// The hardware takes 16 bytes a lane from a quarter of a warp at once, 8 bytes from a half.
static void count_instruction(Site& site, const Instruction& instruction) {
  uint32_t bytes = std::min<uint32_t>(site.bytes, 16);
  int together = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  for (uint32_t offset = 0; offset < site.bytes; offset += bytes)
    for (int lane = 0; lane < kLanes; lane += together)
      count_phase(site, instruction, lane, lane + together, offset, bytes);
}

static void count_accesses() {
  for (Site& site : sites) {
    for (auto& instructions : site.by_warp) {
      for (const Instruction& instruction : instructions) count_instruction(site, instruction);
      instructions.clear();
    }
    std::fill(site.visits.begin(), site.visits.end(), 0);
  }
}

// Returns the offset of an access that is allowed.
static inline uint32_t check_shared(const void* at, size_t bytes) {
  long offset = static_cast<const unsigned char*>(at) - shared_memory;
  if (offset < 0 || offset + bytes > shared_bytes)
    fault("%zu bytes at offset %ld of %zu bytes of shared memory", bytes, offset, shared_bytes);
  if (offset % (bytes < 16 ? bytes : 16))
    fault("misaligned: %zu bytes at offset %ld of shared memory", bytes, offset);
  return static_cast<uint32_t>(offset);
}

static inline void access_shared(const void* at, size_t bytes, int site) {
  uint32_t offset = check_shared(at, bytes);
  if (counting) note(site, current, offset, bytes);
}

// What device functions are given.
struct Address {
  unsigned char* at;
  int site;
};

template <typename T>
struct Reading {
  const unsigned char* at;
  int site;

  explicit Reading(int site) : at(shared_memory), site(site) {}
  Reading(const unsigned char* at, int site) : at(at), site(site) {}
  template <typename U>
  explicit Reading(Reading<U> from) : at(from.at), site(from.site) {}
  Reading operator+(long i) const { return {at + i * static_cast<long>(sizeof(T)), site}; }
  T operator[](long i) const { return *(*this + i); }
  T operator*() const {
    access_shared(at, sizeof(T), site);
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
};

template <typename T>
struct Element {
  unsigned char* at;
  int site;

  void operator=(const T& value) const {
    access_shared(at, sizeof(T), site);
    std::memcpy(at, &value, sizeof value);
  }
  Address operator&() const { return {at, site}; }
};

template <typename T>
struct Writing {
  unsigned char* at;
  int site;

  explicit Writing(int site) : at(shared_memory), site(site) {}
  Writing(unsigned char* at, int site) : at(at), site(site) {}
  template <typename U>
  explicit Writing(Writing<U> from) : at(from.at), site(from.site) {}
  Writing operator+(long i) const { return {at + i * static_cast<long>(sizeof(T)), site}; }
  Element<T> operator[](long i) const { return *(*this + i); }
  Element<T> operator*() const { return {at, site}; }
};

}  // namespace emulator
