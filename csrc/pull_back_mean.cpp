// pull_back_mean on a GPU: pull_back and robust_mean alternate over tiles of source pixels, whose contributions fit the
// scratch memory and the cache.
#include "cuda.h"

namespace dave::cuda {

void pull_back_mean(const Queue& queue, const void* cotangents, Dtype given, const Images& images, const Draws& draws,
                    Patch patch, int64_t samples, int64_t tile, void* scratch, void* raw) {
  const int64_t plane = images.height * images.width;
  for (int64_t b = 0; b < draws.rows / samples; ++b)
    for (int64_t first = 0; first < plane; first += tile) {
      const Span span{first, plane - first < tile ? plane - first : tile};
      pull_back(queue, cotangents, given, images, draws, {b * samples, samples}, patch, span, scratch, images.dtype);
      const Contributions tiled{scratch, images.dtype, 1, samples, images.channels * span.pixels};
      robust_mean(queue, tiled, {span.pixels, plane, b * images.channels * plane + first}, raw);
    }
}

}  // namespace dave::cuda
