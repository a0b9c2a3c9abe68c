// The register tile that both bars share: MR rows x NT vectors. A column's occupancy bitmask over
// the panel's MR rows selects one of 2^MR-1 nano-kernels (Sparse Register Tiling, Wilkinson et al.,
// PLDI 2023); columns with the same mask are stored side by side, so no loop has a branch inside.
#pragma once
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <vector>

#include "vector.h"

// Eight is the largest NT: loops over the tile are unrolled whole.
#define UNROLLED _Pragma("GCC unroll 8") for

static inline double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Whether a tile may be tried on a size that it may not divide: the AVX-512 bar stays the one that
// the figures of old were compared with, which pads nothing that is a multiple of 16.
static inline bool fits(int size, int tile) {
  return LANES == 8 || size % tile == 0 || size % 16 != 0;
}

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <int MR, int NT, int Mask>
static inline __attribute__((always_inline)) void nano_kernel(int count, const uint16_t*& column,
                                                              const float*& value, const float* x,
                                                              Vector (&acc)[MR][NT]) {
  constexpr int kRows = __builtin_popcount(Mask);
  for (int t = 0; t < count; ++t) {
    const float* row = x + (size_t)column[t] * (LANES * NT);
    Vector v[NT];
    UNROLLED(int j = 0; j < NT; ++j) v[j] = load(row + LANES * j);
    int q = 0;
    UNROLLED(int r = 0; r < MR; ++r) {
      if (!(Mask >> r & 1)) continue;
      const Vector w = broadcast(value[q++]);
      UNROLLED(int j = 0; j < NT; ++j) acc[r][j] = multiply_add(w, v[j], acc[r][j]);
    }
    value += kRows;
  }
  column += count;
}

template <int MR, int NT, int Mask>
struct EveryMask {
  static inline __attribute__((always_inline)) void run(const uint16_t* counts,
                                                        const uint16_t*& column,
                                                        const float*& value, const float* x,
                                                        Vector (&acc)[MR][NT]) {
    EveryMask<MR, NT, Mask - 1>::run(counts, column, value, x, acc);
    nano_kernel<MR, NT, Mask>(counts[Mask], column, value, x, acc);
  }
};
template <int MR, int NT>
struct EveryMask<MR, NT, 0> {
  static inline void run(const uint16_t*, const uint16_t*&, const float*&, const float*,
                         Vector (&)[MR][NT]) {}
};

struct Packed {
  int panels = 0;
  std::vector<int> rows;          // output row of each panel slot; slots behind the last row are empty
  std::vector<uint16_t> counts;   // [K blocks][panels][2^MR] columns per mask
  std::vector<uint16_t> columns;  // column inside its K block
  std::vector<float> values;
  std::vector<size_t> column_at, value_at;  // start of each (K block, panel)

  // Address and bytes of each array.
  void describe(int64_t* out) const {
    const auto array = [&out](const auto& a) {
      *out++ = (int64_t)a.data();
      *out++ = a.size() * sizeof(a[0]);
    };
    array(rows), array(counts), array(columns), array(values), array(column_at), array(value_at);
  }
};

// Greedy: a panel starts with the first row left and takes, MR-1 times, the row that shares most
// columns with it.
static inline std::vector<int> cluster_rows(const float* W, int M, int K, int MR) {
  const int words = ceil_div(K, 64);
  std::vector<uint64_t> bits((size_t)M * words, 0), panel(words);
  std::vector<int> own(M, 0);
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < K; ++c)
      if (W[(size_t)m * K + c] != 0) bits[(size_t)m * words + c / 64] |= 1ull << c % 64, ++own[m];
  std::vector<char> used(M, 0);
  std::vector<int> order;
  for (int s = 0; s < M; ++s) {
    if (used[s]) continue;
    used[s] = 1;
    order.push_back(s);
    std::copy_n(&bits[(size_t)s * words], words, panel.begin());
    for (int r = 1; r < MR; ++r) {
      int best = -1;
      double best_score = -1;
      for (int m = 0; m < M; ++m) {
        if (used[m]) continue;
        int shared = 0;
        for (int i = 0; i < words; ++i)
          shared += __builtin_popcountll(panel[i] & bits[(size_t)m * words + i]);
        const double score = shared / std::sqrt(own[m] + 1.0);
        if (score > best_score) best_score = score, best = m;
      }
      if (best < 0) break;
      used[best] = 1;
      order.push_back(best);
      for (int i = 0; i < words; ++i) panel[i] |= bits[(size_t)best * words + i];
    }
  }
  return order;
}

static inline Packed pack(const float* W, int M, int K, int MR, int KB, std::vector<int> order) {
  Packed w;
  w.panels = ceil_div(M, MR);
  w.rows = std::move(order);
  for (int m = M; m < w.panels * MR; ++m) w.rows.push_back(m);
  const int blocks = ceil_div(K, KB);
  w.counts.assign((size_t)blocks * w.panels << MR, 0);
  std::vector<int> mask_of(KB);
  for (int kb = 0; kb < blocks; ++kb)
    for (int g = 0; g < w.panels; ++g) {
      const int first = kb * KB, count = std::min(KB, K - first);
      const auto at = [&](int r, int c) {
        const int row = w.rows[g * MR + r];
        return row < M ? W[(size_t)row * K + first + c] : 0.0f;
      };
      for (int c = 0; c < count; ++c) {
        mask_of[c] = 0;
        for (int r = 0; r < MR; ++r) mask_of[c] |= (at(r, c) != 0) << r;
      }
      const size_t group = (size_t)kb * w.panels + g;
      w.column_at.push_back(w.columns.size());
      w.value_at.push_back(w.values.size());
      for (int mask = 1; mask < 1 << MR; ++mask)
        for (int c = 0; c < count; ++c) {
          if (mask_of[c] != mask) continue;
          w.columns.push_back(c);
          w.counts[(group << MR) + mask]++;
          for (int r = 0; r < MR; ++r)
            if (mask >> r & 1) w.values.push_back(at(r, c));
        }
    }
  return w;
}

// A weight [M][K], with the orders of its rows that were found so far.
struct Weight {
  int M, K;
  std::vector<float> values;
  std::map<int, std::vector<int>> orders;

  Weight(int M, int K, const float* w) : M(M), K(K), values(w, w + (size_t)M * K) {}
  Packed packed(int MR, int KB) {
    auto found = orders.find(MR);
    if (found == orders.end())
      found = orders.emplace(MR, cluster_rows(values.data(), M, K, MR)).first;
    return pack(values.data(), M, K, MR, KB, found->second);
  }
};
