// Host driver of robust_mean: one block of pixels a task, its channels in turn.
#include "block_mean.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
struct Work {
  BlockMean<T> block;
  BlockVariance<T> variance;

  Work(int64_t samples, bool wanted) : block(samples), variance(wanted ? samples : 0) {}
};

template <typename T>
void run(const Contributions& of, Means to, int threads) {
  const Network network(of.samples);
  const int64_t blocks = (of.pixels + block_pixels - 1) / block_pixels, stride = of.channels * of.pixels;
  const PerThread<Work<T>> works(threads, of.samples, to.variance != nullptr);
  works.run(of.images * blocks, [&](Work<T>& work, int64_t task) {
    const int64_t image = task / blocks, x = task % blocks * block_pixels;
    const int64_t wanted = of.pixels - x < block_pixels ? of.pixels - x : block_pixels;
    const BlockVariance<T>* variance = to.variance ? &work.variance : nullptr;
    if (variance) variance->clear();
    for (int64_t c = 0; c < of.channels; ++c) {
      const int64_t first = c * of.pixels + x;
      work.block.run(of.values, image * of.samples * stride + first, stride, of.samples, wanted, network, variance);
      copy_row<T, T>(work.block.means, static_cast<T*>(to.raw) + image * stride + first, wanted);
    }
    if (!variance) return;
    variance->finish(of.channels, wanted);
    copy_row<double, double>(variance->variances, to.variance + image * of.pixels + x, wanted);
  });
}

}  // namespace

void robust_mean(const Contributions& contributions, Means to, int threads) {
  if (contributions.values.dtype == Dtype::float64) return run<double>(contributions, to, threads);
  run<float>(contributions, to, threads);
}

}  // namespace dave::DAVE_ISA
