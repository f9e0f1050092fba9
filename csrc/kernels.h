// The ops on the host: plain pointers and sizes, without torch. Callers check shapes.
#pragma once

#include <cstdint>

#include "attention.h"
#include "epilogue.h"
#include "linear.h"
#include "numerics.h"

namespace dave {

// (count, channels, height, width), contiguous
struct Images {
  const void* data;
  Dtype dtype;
  int64_t count, channels, height, width;
};

// One perturbation a row; the fields of dave_fast.sampling.Draws
struct Draws {
  const int64_t* image_index;
  const double* matrices;
  const double* signal;
  const double* noise;
  const int64_t* keys;
  const int64_t* samples;
  int64_t rows;
};

struct Patch {
  int64_t height, width;
};

// What the ops on pixels are given: images, one perturbation a row, and the patches that become tokens.
struct Inputs {
  Images images;
  Draws draws;
  Patch patch;
};

// Memory to read or to write, of a dtype known at run time
struct Values {
  const void* data;
  Dtype dtype;
};
struct Output {
  void* data;
  Dtype dtype;
};

// (images, samples, channels, pixels)
struct Contributions {
  Values values;
  int64_t images, samples, channels, pixels;
};

// Where means are written, and, unless it is null, the variance of their sum over the channels.
struct Means {
  void* raw;
  double* variance;
};

// One instruction set's build of every op but linear
struct Kernels {
  void (*perturb)(const Inputs& inputs, Output tokens, int threads);
  void (*normal)(const int64_t* keys, const int64_t* samples, int64_t rows, int64_t elements, float* deviates,
                 int threads);
  void (*pull_back)(Values cotangents, const Inputs& inputs, Output contributions, int threads);
  // rows of `samples` an image -> (rows / samples, channels, height, width) of the images' type
  void (*pull_back_mean)(Values cotangents, const Inputs& inputs, int64_t samples, Means to, int threads);
  // densities (rows, patches) of the images' type -> (rows / samples, 1, height, width) of it. Of the images, of one
  // channel, only the sizes are read, of the draws the matrices.
  void (*spread_mean)(Values densities, const Inputs& inputs, int64_t samples, Means to, int threads);
  // -> (images, channels, pixels); float64 for float64, else float32
  void (*robust_mean)(const Contributions& contributions, Means to, int threads);
  // variance (count, height, width) and raw, float32 or float64 -> (count, height, width) of raw's type
  void (*shrink)(const double* variance, const Images& raw, void* shrunk, int threads);
  // float32 or float64 (count, channels, height, width) -> (count, height, width)
  void (*smooth)(const Images& raw, void* maps, int threads);
  // Whether bfloat16 is multiplied by an instruction of its own.
  bool multiplies_bfloat16;
  // out (rows, queries, heads, D); kept and saved are written where they are not null
  void (*attention)(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v, void* out,
                    PeakAndShare kept, SavedProbabilities saved, int threads);
  // d_v (rows, tokens, heads, D), from saved P where it is not null, else from q, k and kept
  void (*attention_vjp)(const AttentionShape& shape, const Heads& q, const Heads& k, PeakAndShare kept,
                        SavedProbabilities saved, const Heads& d_out, void* d_v, int threads);
  // float32 or bfloat16 (rows, width), as below
  void (*row_rstd)(Values x, int64_t rows, int64_t width, float eps, bool centred, float* rstd, int threads);
  void (*scale_rows)(Values x, const float* scale, int64_t rows, int64_t width, void* y, int threads);
  void (*activate)(Values u, Activation activation, Gated gated, int64_t rows, int64_t hidden, void* h, void* gate,
                   int threads);
};

// One instruction set's build of linear. There are more of these: VNNI came without bfloat16 too.
struct Products {
  // Whether bytes are multiplied by an instruction of their own.
  bool multiplies_bytes;
  // Columns of a panel of linear's weights.
  int64_t linear_panel;
  // matrix (out, in) -> weights of panels · panel_words words
  void (*pack_linear)(const float* matrix, const PackedShape& shape, uint32_t* packed);
  // x (rows, in) -> y (rows, out), contiguous; y may be the residual itself
  void (*linear)(const Rows& x, const PackedShape& shape, const uint32_t* weights, const Epilogue& epilogue, Matrix y,
                 int threads);
};

}  // namespace dave
