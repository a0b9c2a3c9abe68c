// Operations of whole warps: shuffles, ldmatrix, mma and mma.sp.
//
// Each lane leaves a pointer to its operands; the last one to come does the work of all.
#pragma once

namespace emulator {

struct Warp {
  const char* name;
  int line, arrived;
  void* operands[kLanes];
};
static std::vector<Warp> warps;

static void start_warps() { warps.assign(fibres.size() / kLanes, Warp()); }

static void expect_same(const Warp& warp, const char* name, int line) {
  if (std::strcmp(warp.name, name) || warp.line != line)
    fault("a warp that diverged: came to %s, line %d, other lanes to %s, line %d", name, line,
          warp.name, warp.line);
}

template <typename Operands>
static void together(const char* name, int line, Operands& mine,
                     void (*act)(Operands* const* lanes)) {
  if (current / kLanes >= warps.size()) fault("%s in a warp without all its lanes", name);
  size_t begin = current / kLanes * kLanes;
  Warp& warp = warps[current / kLanes];
  if (warp.arrived == 0) {
    warp.name = name;
    warp.line = line;
  }
  expect_same(warp, name, line);
  warp.operands[current % kLanes] = &mine;
  if (++warp.arrived < kLanes) return wait(name, line);
  act(reinterpret_cast<Operands* const*>(warp.operands));
  warp.arrived = 0;
  for (size_t lane = begin; lane < begin + kLanes; ++lane)
    if (lane != current) make_ready(lane);
}

struct Nothing {};
static void nothing(Nothing* const*) {}

static void synchronize_warp(int line) {
  Nothing mine;
  together<Nothing>("__syncwarp", line, mine, nothing);
}

template <typename T>
struct Shuffled {
  T value, result;
  int from;
};

template <typename T>
static void exchange(Shuffled<T>* const* lanes) {
  for (int lane = 0; lane < kLanes; ++lane)
    lanes[lane]->result = lanes[lanes[lane]->from]->value;
}

template <typename T>
static T shuffle(const char* name, int line, unsigned mask, T value, int from) {
  if (mask != 0xffffffffu) fault("%s of some lanes only", name);
  Shuffled<T> mine = {value, value, from};
  together<Shuffled<T>>(name, line, mine, exchange<T>);
  return mine.result;
}

static int this_lane() { return static_cast<int>(current % kLanes); }

template <typename T>
static T shuffle_index(int line, unsigned mask, T value, int lane, int width = kLanes) {
  int base = this_lane() & ~(width - 1);
  return shuffle("__shfl_sync", line, mask, value, base + (lane & (width - 1)));
}

template <typename T>
static T shuffle_down(int line, unsigned mask, T value, int by, int width = kLanes) {
  int lane = this_lane(), last = lane | (width - 1);
  return shuffle("__shfl_down_sync", line, mask, value, lane + by > last ? lane : lane + by);
}

template <typename T>
static T shuffle_up(int line, unsigned mask, T value, int by, int width = kLanes) {
  int lane = this_lane(), first = lane & ~(width - 1);
  return shuffle("__shfl_up_sync", line, mask, value, lane - by < first ? lane : lane - by);
}

template <typename T>
static T shuffle_xor(int line, unsigned mask, T value, int bits, int width = kLanes) {
  int lane = this_lane(), last = lane | (width - 1);
  return shuffle("__shfl_xor_sync", line, mask, value, (lane ^ bits) > last ? lane : lane ^ bits);
}

struct MatrixRows {
  uint* to;
  Address row;
};

template <int count, bool transposed>
static void load_matrix_rows(MatrixRows* const* lanes) {
  size_t begin = current / kLanes * kLanes;
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t rows[8][8];
    for (int row = 0; row < 8; ++row) {
      const Address& from = lanes[8 * matrix + row]->row;
      uint32_t offset = check_shared(from.at, 16);
      if (counting) note(from.site, begin + 8 * matrix + row, offset, 16);
      std::memcpy(rows[row], from.at, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      int g = lane / 4, t = 2 * (lane % 4);
      uint low = transposed ? rows[t][g] : rows[g][t];
      uint high = transposed ? rows[t + 1][g] : rows[g][t + 1];
      lanes[lane]->to[matrix] = high << 16 | low;
    }
  }
}

template <int count, bool transposed>
static void load_matrices(const char* name, int line, uint* to, Address row) {
  MatrixRows mine = {to, row};
  together<MatrixRows>(name, line, mine, load_matrix_rows<count, transposed>);
}

static void expand_pairs(int count, uint* to, Address values, uint bits) {
  for (int i = 0; i < count; ++i) to[i] = 0;
  for (int bit = 0; bit < 2 * count; ++bit) {
    if (!(bits >> bit & 1)) {
      // Lanes that read the next value must not seem to read it together with those of this bit.
      if (counting) visit(values.site, current);
      continue;
    }
    uint16_t value;
    access_shared(values.at, sizeof value, values.site);
    std::memcpy(&value, values.at, sizeof value);
    to[bit / 2] |= static_cast<uint>(value) << 16 * (bit % 2);
    values.at += sizeof value;
  }
}

struct Factors {
  float* c;
  const uint *a, *b;
  uint chosen;
};

// Returns one of the two numbers of a register.
template <typename Number>
static float part(uint pair, int which) {
  Number number;
  number.bits = static_cast<uint16_t>(pair >> 16 * which);
  return number;
}

template <typename Number>
static void unpack_a(Factors* const* lanes, float (*a)[16]) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 8; ++i) {
      int row = lane / 4 + 8 * (i / 2 % 2), column = 2 * (lane % 4) + 8 * (i / 4) + i % 2;
      a[row][column] = part<Number>(lanes[lane]->a[i / 2], i % 2);
    }
}

template <typename Number>
static void unpack_b(Factors* const* lanes, int registers, float (*b)[8]) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 2 * registers; ++i)
      b[2 * (lane % 4) + 8 * (i / 2) + i % 2][lane / 4] = part<Number>(lanes[lane]->b[i / 2], i % 2);
}

static void add_product(Factors* const* lanes, const float (*a)[32], const float (*b)[8], int k) {
  for (int row = 0; row < 16; ++row) {
    float sums[8];
    for (int column = 0; column < 8; ++column)
      sums[column] = lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2];
    for (int i = 0; i < k; ++i)
      for (int column = 0; column < 8; ++column) sums[column] += a[row][i] * b[i][column];
    for (int column = 0; column < 8; ++column)
      lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2] = sums[column];
  }
}

template <typename Number>
static void multiply_dense(Factors* const* lanes) {
  float held[16][16], a[16][32], b[16][8];
  unpack_a<Number>(lanes, held);
  unpack_b<Number>(lanes, 2, b);
  for (int row = 0; row < 16; ++row) std::copy(held[row], held[row] + 16, a[row]);
  add_product(lanes, a, b, 16);
}

// Puts a row's kept elements where the metadata says.
static void spread(const float* held, const uint (*chosen)[2], int row, float* a) {
  std::fill(a, a + 32, 0.0f);
  for (int four = 0; four < 8; ++four) {
    uint pair = chosen[row % 8][four / 4] >> (row / 8 * 16 + four % 4 * 4);
    int low = pair & 3, high = pair >> 2 & 3;
    if (low >= high)
      fault("mma.sp is told to take elements %d and %d of four %d of row %d", low, high, four, row);
    a[4 * four + low] = held[2 * four];
    a[4 * four + high] = held[2 * four + 1];
  }
}

template <typename Number, int selector>
static void multiply_chosen(Factors* const* lanes) {
  float held[16][16], a[16][32], b[32][8];
  uint chosen[8][2];
  unpack_a<Number>(lanes, held);
  unpack_b<Number>(lanes, 4, b);
  for (int g = 0; g < 8; ++g)
    for (int part = 0; part < 2; ++part) chosen[g][part] = lanes[4 * g + 2 * selector + part]->chosen;
  for (int row = 0; row < 16; ++row) spread(held[row], chosen, row, a[row]);
  add_product(lanes, a, b, 32);
}

// TF32: a float32 of which the last 13 bits are not read.
static float as_tf32(uint word) {
  word &= 0xffffe000u;
  float number;
  std::memcpy(&number, &word, sizeof number);
  return number;
}

static void unpack_a32(Factors* const* lanes, float (*a)[8]) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i)
      a[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = as_tf32(lanes[lane]->a[i]);
}

static void unpack_b32(Factors* const* lanes, int registers, float (*b)[8]) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < registers; ++i)
      b[lane % 4 + 4 * i][lane / 4] = as_tf32(lanes[lane]->b[i]);
}

static void multiply_dense32(Factors* const* lanes) {
  float held[16][8], a[16][32], b[8][8];
  unpack_a32(lanes, held);
  unpack_b32(lanes, 2, b);
  for (int row = 0; row < 16; ++row) std::copy(held[row], held[row] + 8, a[row]);
  add_product(lanes, a, b, 8);
}

// Puts a row's kept elements, one of each pair, where the metadata says: as two halves each.
static void spread32(const float* held, const uint (*chosen)[2], int row, float* a) {
  std::fill(a, a + 16, 0.0f);
  for (int pair = 0; pair < 8; ++pair) {
    uint code = chosen[row % 8][pair / 4] >> (row / 8 * 16 + pair % 4 * 4) & 15;
    if (code != 0x4 && code != 0xe) fault("mma.sp is told %x of pair %d of row %d", code, pair, row);
    a[2 * pair + (code == 0xe)] = held[pair];
  }
}

template <int selector>
static void multiply_chosen32(Factors* const* lanes) {
  float held[16][8], a[16][32], b[16][8];
  uint chosen[8][2];
  unpack_a32(lanes, held);
  unpack_b32(lanes, 4, b);
  for (int g = 0; g < 8; ++g)
    for (int part = 0; part < 2; ++part) chosen[g][part] = lanes[4 * g + 2 * selector + part]->chosen;
  for (int row = 0; row < 16; ++row) spread32(held[row], chosen, row, a[row]);
  add_product(lanes, a, b, 16);
}

static void multiply32(const char* name, int line, float* c, const uint* a, const uint* b) {
  Factors mine = {c, a, b, 0};
  together<Factors>(name, line, mine, multiply_dense32);
}

template <int selector>
static void multiply_one_of_two(const char* name, int line, float* c, const uint* a, const uint* b,
                                uint chosen) {
  Factors mine = {c, a, b, chosen};
  together<Factors>(name, line, mine, multiply_chosen32<selector>);
}

// Splits numbers as `sparse_split_N` does: the same arithmetic.
template <int count>
static void split(uint* big, uint* small, const uint* x) {
  for (int i = 0; i < count; ++i) {
    float number, first;
    big[i] = (x[i] + 0x1000u) & 0xffffe000u;
    std::memcpy(&number, &x[i], sizeof number);
    std::memcpy(&first, &big[i], sizeof first);
    float rest = number - first;
    std::memcpy(&small[i], &rest, sizeof rest);
    small[i] += 0x1000u;
  }
}

template <typename Number>
static void multiply(const char* name, int line, float* c, const uint* a, const uint* b) {
  Factors mine = {c, a, b, 0};
  together<Factors>(name, line, mine, multiply_dense<Number>);
}

template <typename Number, int selector>
static void multiply_two_of_four(const char* name, int line, float* c, const uint* a,
                                 const uint* b, uint chosen) {
  Factors mine = {c, a, b, chosen};
  together<Factors>(name, line, mine, multiply_chosen<Number, selector>);
}

}  // namespace emulator

// A macro tells which line called.
#define __syncwarp(...) emulator::synchronize_warp(__LINE__)
#define __activemask() 0xffffffffu
#define __shfl_sync(...) emulator::shuffle_index(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::shuffle_xor(__LINE__, __VA_ARGS__)

#define EMULATOR_MATRICES(count, turned) \
  emulator::load_matrices<count, turned>("ldmatrix", __LINE__,
#define sparse_load_matrices_1(...) EMULATOR_MATRICES(1, false) __VA_ARGS__)
#define sparse_load_matrices_2(...) EMULATOR_MATRICES(2, false) __VA_ARGS__)
#define sparse_load_matrices_4(...) EMULATOR_MATRICES(4, false) __VA_ARGS__)
#define sparse_load_matrices_1_transposed(...) EMULATOR_MATRICES(1, true) __VA_ARGS__)
#define sparse_load_matrices_2_transposed(...) EMULATOR_MATRICES(2, true) __VA_ARGS__)
#define sparse_load_matrices_4_transposed(...) EMULATOR_MATRICES(4, true) __VA_ARGS__)

#define sparse_expand_pairs_4(...) emulator::expand_pairs(4, __VA_ARGS__)

#define sparse_multiply_f16(...) emulator::multiply<half>("mma", __LINE__, __VA_ARGS__)
#define sparse_multiply_bf16(...) emulator::multiply<nv_bfloat16>("mma", __LINE__, __VA_ARGS__)

#define EMULATOR_CHOSEN(type, selector) \
  emulator::multiply_two_of_four<type, selector>("mma.sp", __LINE__,
#define sparse_multiply_two_of_four_f16_0(...) EMULATOR_CHOSEN(half, 0) __VA_ARGS__)
#define sparse_multiply_two_of_four_f16_1(...) EMULATOR_CHOSEN(half, 1) __VA_ARGS__)
#define sparse_multiply_two_of_four_bf16_0(...) EMULATOR_CHOSEN(nv_bfloat16, 0) __VA_ARGS__)
#define sparse_multiply_two_of_four_bf16_1(...) EMULATOR_CHOSEN(nv_bfloat16, 1) __VA_ARGS__)
#define sparse_multiply_tf32(...) emulator::multiply32("mma", __LINE__, __VA_ARGS__)
#define sparse_multiply_two_of_four_tf32_0(...) \
  emulator::multiply_one_of_two<0>("mma.sp", __LINE__, __VA_ARGS__)
#define sparse_multiply_two_of_four_tf32_1(...) \
  emulator::multiply_one_of_two<1>("mma.sp", __LINE__, __VA_ARGS__)
#define sparse_split_2 emulator::split<2>
#define sparse_split_4 emulator::split<4>
