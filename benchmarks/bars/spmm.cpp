// What hand-written code reaches for Y[M,N] = W[M,K] * X[K,N] with a pruned constant W, one thread,
// float32: the bar that the generated kernels are held against.
//
// Activations lie in panels [ceil(N/width)][K][width] with width = LANES*NT, results in
// [ceil(N/width)][rows][width]; both are padded by whole vectors, and rows by empty ones, where
// a problem does not divide. Every (MR, NT, KB) of the tables below is a candidate.
#include "register_tile.h"

namespace {

using Kernel = void (*)(int K, int panels_of_x, int KB, const Packed&, const float* x, float* y);

template <int MR, int NT>
__attribute__((noinline)) void spmm(int K, int panels_of_x, int KB, const Packed& w, const float* X,
                                    float* Y) {
  constexpr int kWidth = LANES * NT;
  const int blocks = ceil_div(K, KB), panels = w.panels, height = panels * MR;
  for (int p = 0; p < panels_of_x; ++p) {
    const float* x = X + (size_t)p * K * kWidth;
    float* y = Y + (size_t)p * height * kWidth;
    for (int kb = 0; kb < blocks; ++kb) {
      for (int g = 0; g < panels; ++g) {
        const int* row = w.rows.data() + g * MR;
        Vector acc[MR][NT];
        UNROLLED(int r = 0; r < MR; ++r)
        UNROLLED(int j = 0; j < NT; ++j)
        acc[r][j] = kb ? load(y + (size_t)row[r] * kWidth + LANES * j) : zero();
        const size_t at = (size_t)kb * panels + g;
        const uint16_t* column = w.columns.data() + w.column_at[at];
        const float* value = w.values.data() + w.value_at[at];
        EveryMask<MR, NT, (1 << MR) - 1>::run(w.counts.data() + (at << MR), column, value,
                                              x + (size_t)kb * KB * kWidth, acc);
        UNROLLED(int r = 0; r < MR; ++r)
        UNROLLED(int j = 0; j < NT; ++j)
        store(y + (size_t)row[r] * kWidth + LANES * j, acc[r][j]);
      }
    }
  }
}

struct Tile {
  int mr, nt;
  Kernel run;
};

#if LANES == 16
const Tile kTiles[] = {{1, 4, spmm<1, 4>}, {1, 8, spmm<1, 8>}, {2, 4, spmm<2, 4>},
                       {2, 8, spmm<2, 8>}, {4, 1, spmm<4, 1>}, {4, 2, spmm<4, 2>},
                       {4, 4, spmm<4, 4>}, {3, 8, spmm<3, 8>}, {6, 2, spmm<6, 2>},
                       {6, 4, spmm<6, 4>}};
#else
const Tile kTiles[] = {{1, 4, spmm<1, 4>}, {2, 4, spmm<2, 4>}, {2, 2, spmm<2, 2>},
                       {4, 2, spmm<4, 2>}, {3, 3, spmm<3, 3>}, {4, 1, spmm<4, 1>},
                       {6, 1, spmm<6, 1>}, {6, 2, spmm<6, 2>}, {4, 3, spmm<4, 3>}};
#endif

// A block of activations is there to fit L1.
constexpr int kLargestBlock = 64 << 10, kShortestBlock = 48;

struct Candidate {
  const Tile* tile;
  int kb;
};

struct Problem {
  Weight weight;
  int N;
  std::vector<Candidate> candidates;

  Problem(int M, int K, int N, const float* w) : weight(M, K, w), N(N) {
    // A length with few divisors is cut as if it were the next multiple of 16.
    const int length = ceil_div(K, 16) * 16;
    for (const Tile& tile : kTiles) {
      if (!fits(M, tile.mr) || !fits(N, tile.nt * LANES)) continue;
      for (int blocks = 1; blocks == 1 || length / blocks >= kShortestBlock; ++blocks) {
        const int kb = length / blocks, bytes = kb * 4 * LANES * tile.nt;
        if (length % blocks || kb > 65535 || (blocks > 1 && bytes > kLargestBlock)) continue;
        candidates.push_back({&tile, kb});
      }
    }
  }
};

struct Instance {
  int K, panels_of_x, kb;
  const Tile* tile;
  Packed weight;
};

}  // namespace

extern "C" {

void* spmm_problem(int M, int K, int N, const float* w) { return new Problem(M, K, N, w); }
void spmm_problem_free(void* problem) { delete (Problem*)problem; }
int spmm_candidates(void* problem) { return ((Problem*)problem)->candidates.size(); }

void* spmm_create(void* handle, int index) {
  Problem& problem = *(Problem*)handle;
  const Candidate c = problem.candidates.at(index);
  return new Instance{problem.weight.K, ceil_div(problem.N, LANES * c.tile->nt), c.kb, c.tile,
                     problem.weight.packed(c.tile->mr, c.kb)};
}
void spmm_free(void* kernel) { delete (Instance*)kernel; }

// MR, NT, KB, panels of activations, rows of the output; then the packed weight's
// arrays, each as address and bytes.
void spmm_describe(void* handle, int64_t* out) {
  const Instance& k = *(Instance*)handle;
  out[0] = k.tile->mr, out[1] = k.tile->nt, out[2] = k.kb, out[3] = k.panels_of_x;
  out[4] = k.weight.panels * k.tile->mr;
  k.weight.describe(out + 5);
}

void spmm_run(void* handle, const float* x, float* y) {
  const Instance& k = *(Instance*)handle;
  k.tile->run(k.K, k.panels_of_x, k.kb, k.weight, x, y);
}

// Seconds of the fastest of `calls`.
double spmm_fastest(void* handle, const float* x, float* y, int calls) {
  double best = 1e9;
  for (int i = 0; i < calls; ++i) {
    const double start = now();
    spmm_run(handle, x, y);
    best = std::min(best, now() - start);
  }
  return best;
}
}
