// The pixel ops as the host runs them: plain pointers and sizes, no torch. Shapes and checks belong to the callers.
#pragma once

#include <cstdint>

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

// One instruction set's build of every op
struct Kernels {
  const char* isa;
  void (*perturb)(const Images& images, const Draws& draws, Patch patch, void* tokens, Dtype stored, int threads);
  void (*normal)(const int64_t* keys, const int64_t* samples, int64_t rows, int64_t elements, float* deviates,
                 int threads);
  void (*pull_back)(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
                    void* contributions, Dtype stored, int threads);
  // (images, samples, pixels) -> (images, pixels); float64 for float64, else float32
  void (*robust_mean)(const void* contributions, Dtype given, int64_t images, int64_t samples, int64_t pixels,
                      void* raw, int threads);
  // float32 or float64 (count, channels, height, width) -> (count, height, width)
  void (*smooth)(const Images& raw, void* maps, int threads);
};

}  // namespace dave
