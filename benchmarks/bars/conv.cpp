// What hand-written code reaches for a stride-1 "same" convolution with a pruned constant weight,
// one thread, float32: the bar for convolutions.
//
// Images come padded, [batch][IC][H+2p][W+2p]; output pixels are counted along padded rows, so that
// every tap is one constant offset and a tile of LANES*NT pixels is one contiguous, unaligned run
// of each (channel, tap). Per tile and block of KB (channel, tap) rows the runs are packed into L1
// once and used by every panel of output channels. The few positions between two rows of pixels are
// computed too; they fall on the padding of the next layer's input. Results are
// [batch][rows][plane].
#include <cstdlib>

#include "register_tile.h"

namespace {

using Kernel = void (*)(int K, int tiles, int KB, const Packed&, const int* offset,
                        const float* image, float* packed, float* y, size_t plane);

void pack_runs(const float* image, const int* offset, int count, int first_pixel, int NT,
               float* packed) {
  for (int k = 0; k < count; ++k)
    for (int j = 0; j < NT; ++j)
      store(packed + ((size_t)k * NT + j) * LANES,
            load_unaligned(image + offset[k] + first_pixel + LANES * j));
}

template <int MR, int NT>
__attribute__((noinline)) void conv(int K, int tiles, int KB, const Packed& w, const int* offset,
                                    const float* image, float* packed, float* Y, size_t plane) {
  const int blocks = ceil_div(K, KB), panels = w.panels;
  for (int t = 0; t < tiles; ++t) {
    const int n = t * LANES * NT;
    for (int kb = 0; kb < blocks; ++kb) {
      pack_runs(image, offset + kb * KB, std::min(KB, K - kb * KB), n, NT, packed);
      for (int g = 0; g < panels; ++g) {
        const int* row = w.rows.data() + g * MR;
        Vector acc[MR][NT];
        UNROLLED(int r = 0; r < MR; ++r)
        UNROLLED(int j = 0; j < NT; ++j)
        acc[r][j] = kb ? load_unaligned(Y + row[r] * plane + n + LANES * j) : zero();
        const size_t at = (size_t)kb * panels + g;
        const uint16_t* column = w.columns.data() + w.column_at[at];
        const float* value = w.values.data() + w.value_at[at];
        EveryMask<MR, NT, (1 << MR) - 1>::run(w.counts.data() + (at << MR), column, value, packed,
                                              acc);
        UNROLLED(int r = 0; r < MR; ++r)
        UNROLLED(int j = 0; j < NT; ++j)
        store_unaligned(Y + row[r] * plane + n + LANES * j, acc[r][j]);
      }
    }
  }
}

struct Tile {
  int mr, nt;
  Kernel run;
};

#if LANES == 16
const Tile kTiles[] = {{2, 4, conv<2, 4>}, {2, 8, conv<2, 8>}, {4, 1, conv<4, 1>},
                       {4, 2, conv<4, 2>}, {4, 4, conv<4, 4>}, {3, 8, conv<3, 8>},
                       {6, 4, conv<6, 4>}};
#else
const Tile kTiles[] = {{1, 4, conv<1, 4>}, {2, 4, conv<2, 4>}, {2, 2, conv<2, 2>},
                       {4, 2, conv<4, 2>}, {3, 3, conv<3, 3>}, {4, 1, conv<4, 1>},
                       {6, 1, conv<6, 1>}, {6, 2, conv<6, 2>}, {4, 3, conv<4, 3>}};
#endif
const int kBlocks[] = {64, 96, 128, 144, 192, 256, 288, 384, 512, 576};

struct Candidate {
  const Tile* tile;
  int kb;
};

struct Shape {
  int batch, IC, H, W, OC, R;
  int pad() const { return R / 2; }
  int width() const { return W + 2 * pad(); }
  int height() const { return H + 2 * pad(); }
  int pixels() const { return H * width() - 2 * pad(); }
};

struct Problem {
  Shape shape;
  Weight weight;
  std::vector<Candidate> candidates;

  Problem(const Shape& s, const float* w) : shape(s), weight(s.OC, s.IC * s.R * s.R, w) {
    std::vector<int> blocks;
    for (int kb : kBlocks)
      if (weight.K % kb == 0) blocks.push_back(kb);
    // The original has no block for such a length; the last one is shorter then.
    if (blocks.empty())
      for (int kb : kBlocks)
        if (kb < weight.K) blocks.push_back(kb);
    if (blocks.empty()) blocks.push_back(weight.K);
    for (const Tile& tile : kTiles)
      if (fits(s.OC, tile.mr))
        for (int kb : blocks) candidates.push_back({&tile, kb});
  }
};

struct Instance {
  Shape shape;
  int K, kb, tiles;
  size_t plane;
  const Tile* tile;
  Packed weight;
  std::vector<int> offset;
  float* packed;

  Instance(Problem& problem, const Candidate& c)
      : shape(problem.shape),
        K(problem.weight.K),
        kb(c.kb),
        tiles(ceil_div(shape.pixels(), LANES * c.tile->nt)),
        plane((size_t)tiles * LANES * c.tile->nt),
        tile(c.tile),
        weight(problem.weight.packed(c.tile->mr, c.kb)),
        packed((float*)aligned_alloc(4096, 1 << 20)) {
    for (int c = 0; c < shape.IC; ++c)
      for (int r = 0; r < shape.R; ++r)
        for (int s = 0; s < shape.R; ++s)
          offset.push_back((c * shape.height() + r) * shape.width() + s);
  }
  ~Instance() { free(packed); }
  Instance(const Instance&) = delete;
};

}  // namespace

extern "C" {

void* conv_problem(int batch, int IC, int H, int W, int OC, int R, const float* w) {
  return new Problem({batch, IC, H, W, OC, R}, w);
}
void conv_problem_free(void* problem) { delete (Problem*)problem; }
int conv_candidates(void* problem) { return ((Problem*)problem)->candidates.size(); }

void* conv_create(void* handle, int index) {
  Problem& problem = *(Problem*)handle;
  return new Instance(problem, problem.candidates.at(index));
}
void conv_free(void* kernel) { delete (Instance*)kernel; }

// MR, NT, KB, floats of an output plane, planes of the output; then the packed
// weight's arrays, each as address and bytes.
void conv_describe(void* handle, int64_t* out) {
  const Instance& k = *(Instance*)handle;
  out[0] = k.tile->mr, out[1] = k.tile->nt, out[2] = k.kb, out[3] = k.plane;
  out[4] = k.weight.panels * k.tile->mr;
  k.weight.describe(out + 5);
}

// `x` needs 4096 floats behind the last image: a tile may reach over the end.
void conv_run(void* handle, const float* x, float* y) {
  const Instance& k = *(Instance*)handle;
  const size_t image = (size_t)k.shape.IC * k.shape.height() * k.shape.width();
  const size_t result = (size_t)k.weight.panels * k.tile->mr * k.plane;
  for (int b = 0; b < k.shape.batch; ++b)
    k.tile->run(k.K, k.tiles, k.kb, k.weight, k.offset.data(), x + b * image, k.packed,
                y + b * result, k.plane);
}

// Seconds of the fastest of `calls`.
double conv_fastest(void* handle, const float* x, float* y, int calls) {
  double best = 1e9;
  for (int i = 0; i < calls; ++i) {
    const double start = now();
    conv_run(handle, x, y);
    best = std::min(best, now() - start);
  }
  return best;
}
}
