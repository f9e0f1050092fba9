// Host drivers of pull_back, and of pull_back_mean and spread_mean: the robust mean of what is pulled back, one tile of
// source pixels at a time, so that a thread stores the contributions of all samples for a single tile.
#include "block_mean.h"
#include "gather.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
void pull(Values cotangents, const Inputs& inputs, Output contributions, int threads) {
  const Images& images = inputs.images;
  const Tiling tiles(images);
  const OfTokens<T> source{cotangents, inputs};
  const PerThread<Gatherer<T>> gatherers(threads, images, Gatherer<T>::largest_window(images, inputs.draws));
  gatherers.run(inputs.draws.rows * tiles.count, [&](Gatherer<T>& gatherer, int64_t task) {
    const int64_t r = task / tiles.count;
    const Tile tile = tiles[task % tiles.count];
    gatherer.run(source, r, tile, [&](int64_t c, int32_t y, const T* row) {
      const int64_t at = ((r * images.channels + c) * images.height + tile.y + y) * images.width + tile.x;
      store_row(row, contributions, at, tile.width);
    });
  });
}

// The scratch memory of one thread: the contributions (samples, channels, height, width) of one tile and their means.
template <typename T>
struct TileMean {
  Gatherer<T> gatherer;
  BlockMean<T> block;
  BlockVariance<T> variance;
  Scratch<T> contributions;

  TileMean(const Images& images, int64_t window, int64_t samples, bool with_variance)
      : gatherer(images, window), block(samples), variance(with_variance ? samples : 0),
        contributions(samples * images.channels * tile_height * tile_width) {}
};

template <typename T, typename Source>
void mean_by_tiles(const Source& source, int64_t samples, Means to, int threads) {
  const Inputs& inputs = source.inputs;
  const Images& images = inputs.images;
  const Tiling tiles(images);
  const Network network(samples);
  const int64_t window = Gatherer<T>::largest_window(images, inputs.draws);
  const PerThread<TileMean<T>> works(threads, images, window, samples, to.variance != nullptr);
  works.run(inputs.draws.rows / samples * tiles.count, [&](TileMean<T>& work, int64_t task) {
    const int64_t b = task / tiles.count;
    const Tile tile = tiles[task % tiles.count];
    const int64_t area = static_cast<int64_t>(tile.width) * tile.height, pixels = images.channels * area;
    for (int64_t s = 0; s < samples; ++s)
      work.gatherer.run(source, b * samples + s, tile, [&](int64_t c, int32_t y, const T* row) {
        T* to = work.contributions + s * pixels + c * area + static_cast<int64_t>(y) * tile.width;
        copy_row(row, to, tile.width);
      });
    // from a pixel of the tile to the place of its value in a plane
    const auto store = [&](const auto* from, int64_t first, int64_t count, auto* plane) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t y = (first + i) / tile.width, x = (first + i) % tile.width;
        plane[(tile.y + y) * images.width + tile.x + x] = from[i];
      }
    };
    const int64_t plane = images.height * images.width;
    const BlockVariance<T>* variance = to.variance ? &work.variance : nullptr;
    for (int64_t first = 0; first < area; first += block_pixels) {
      const int64_t wanted = area - first < block_pixels ? area - first : block_pixels;
      if (variance) variance->clear();
      for (int64_t c = 0; c < images.channels; ++c) {
        const Values values{work.contributions, images.dtype};
        work.block.run(values, c * area + first, pixels, samples, wanted, network, variance);
        T* raw = static_cast<T*>(to.raw) + (b * images.channels + c) * plane;
        store(static_cast<const T*>(work.block.means), first, wanted, raw);
      }
      if (!variance) continue;
      variance->finish(images.channels, wanted);
      store(static_cast<const double*>(variance->variances), first, wanted, to.variance + b * plane);
    }
  });
}

}  // namespace

void pull_back(Values cotangents, const Inputs& inputs, Output contributions, int threads) {
  if (inputs.images.dtype == Dtype::float64) return pull<double>(cotangents, inputs, contributions, threads);
  pull<float>(cotangents, inputs, contributions, threads);
}

void pull_back_mean(Values cotangents, const Inputs& inputs, int64_t samples, Means to, int threads) {
  if (inputs.images.dtype == Dtype::float64)
    return mean_by_tiles<double>(OfTokens<double>{cotangents, inputs}, samples, to, threads);
  mean_by_tiles<float>(OfTokens<float>{cotangents, inputs}, samples, to, threads);
}

void spread_mean(Values densities, const Inputs& inputs, int64_t samples, Means to, int threads) {
  if (inputs.images.dtype == Dtype::float64)
    return mean_by_tiles<double>(OfPatches<double>{densities, inputs}, samples, to, threads);
  mean_by_tiles<float>(OfPatches<float>{densities, inputs}, samples, to, threads);
}

}  // namespace dave::DAVE_ISA
