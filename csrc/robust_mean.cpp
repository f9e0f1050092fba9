// Host driver of robust_mean: one block of pixels a task.
#include "block_mean.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
void run(const void* contributions, Dtype given, int64_t images, int64_t samples, int64_t pixels, T* raw, int threads) {
  const Network network(samples);
  const int64_t blocks = (pixels + block_pixels - 1) / block_pixels;
  const PerThread<BlockMean<T>> works(threads, samples);
#pragma omp parallel num_threads(threads)
  {
    const BlockMean<T>& block = works.mine();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < images * blocks; ++task) {
      const int64_t image = task / blocks, x = task % blocks * block_pixels;
      const int64_t wanted = pixels - x < block_pixels ? pixels - x : block_pixels;
      block.run(contributions, given, image * samples * pixels + x, pixels, samples, wanted, network);
      copy_row<T, T>(block.means, raw + image * pixels + x, wanted);
    }
  }
}

}  // namespace

void robust_mean(const void* contributions, Dtype given, int64_t images, int64_t samples, int64_t pixels, void* raw,
                 int threads) {
  if (given == Dtype::float64)
    return run(contributions, given, images, samples, pixels, static_cast<double*>(raw), threads);
  run(contributions, given, images, samples, pixels, static_cast<float*>(raw), threads);
}

}  // namespace dave::DAVE_ISA
