// pull_back_mean and spread_mean on a GPU: pull_back or spread and robust_mean alternate over tiles of source pixels, whose
// contributions fit the scratch memory and the cache.
#include "cuda.h"

namespace dave::cuda {
namespace {

void mean_by_tiles(decltype(pull_back)& pull, const Queue& queue, Values from, const Inputs& inputs, int64_t samples,
                   int64_t tile, void* scratch, Means to) {
  const Dtype dtype = inputs.images.dtype;
  const int64_t channels = inputs.images.channels, plane = inputs.images.height * inputs.images.width;
  const int64_t bytes = dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  void* const beyond = static_cast<char*>(scratch) + samples * channels * tile * bytes;
  for (int64_t b = 0; b < inputs.draws.rows / samples; ++b)
    for (int64_t first = 0; first < plane; first += tile) {
      const Span span{first, plane - first < tile ? plane - first : tile};
      pull(queue, from, inputs, {b * samples, samples}, span, {scratch, dtype});
      const Contributions tiled{{scratch, dtype}, 1, samples, channels, span.pixels};
      double* const variance = to.variance ? to.variance + b * plane + first : nullptr;
      robust_mean(queue, tiled, {span.pixels, plane, b * channels * plane + first}, beyond, {to.raw, variance});
    }
}

}  // namespace

void pull_back_mean(const Queue& queue, Values cotangents, const Inputs& inputs, int64_t samples, int64_t tile,
                    void* scratch, Means to) {
  mean_by_tiles(pull_back, queue, cotangents, inputs, samples, tile, scratch, to);
}

void spread_mean(const Queue& queue, Values densities, const Inputs& inputs, int64_t samples, int64_t tile, void* scratch,
                 Means to) {
  mean_by_tiles(spread, queue, densities, inputs, samples, tile, scratch, to);
}

}  // namespace dave::cuda
