// Host driver of robust_mean: one block of pixels a task.
#include "block_mean.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
void run(const Contributions& of, T* raw, int threads) {
  const Network network(of.samples);
  const int64_t blocks = (of.pixels + block_pixels - 1) / block_pixels;
  PerThread<BlockMean<T>>(threads, of.samples).run(of.images * blocks, [&](BlockMean<T>& block, int64_t task) {
    const int64_t image = task / blocks, x = task % blocks * block_pixels;
    const int64_t wanted = of.pixels - x < block_pixels ? of.pixels - x : block_pixels;
    block.run(of.values, image * of.samples * of.pixels + x, of.pixels, of.samples, wanted, network);
    copy_row<T, T>(block.means, raw + image * of.pixels + x, wanted);
  });
}

}  // namespace

void robust_mean(const Contributions& contributions, void* raw, int threads) {
  if (contributions.values.dtype == Dtype::float64) return run(contributions, static_cast<double*>(raw), threads);
  run(contributions, static_cast<float*>(raw), threads);
}

}  // namespace dave::DAVE_ISA
