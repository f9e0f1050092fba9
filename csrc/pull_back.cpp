// Host drivers of pull_back, and of pull_back_mean: robust_mean(pull_back(...)), one tile of source pixels at a time, so
// that a thread stores the contributions of all samples for a single tile.
#include "block_mean.h"
#include "gather.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
void pull(Values cotangents, const Inputs& inputs, Output contributions, int threads) {
  const Images& images = inputs.images;
  const Tiling tiles(images);
  const PerThread<Gatherer<T>> gatherers(threads, images, Gatherer<T>::largest_window(images, inputs.draws));
  gatherers.run(inputs.draws.rows * tiles.count, [&](Gatherer<T>& gatherer, int64_t task) {
    const int64_t r = task / tiles.count;
    const Tile tile = tiles[task % tiles.count];
    gatherer.run(cotangents, inputs, r, tile, [&](int64_t c, int32_t y, const T* row) {
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
  Scratch<T> contributions;

  TileMean(const Images& images, int64_t window, int64_t samples)
      : gatherer(images, window), block(samples),
        contributions(samples * images.channels * tile_height * tile_width) {}
};

template <typename T>
void pull_mean(Values cotangents, const Inputs& inputs, int64_t samples, T* raw, int threads) {
  const Images& images = inputs.images;
  const Tiling tiles(images);
  const Network network(samples);
  const PerThread<TileMean<T>> works(threads, images, Gatherer<T>::largest_window(images, inputs.draws), samples);
  works.run(inputs.draws.rows / samples * tiles.count, [&](TileMean<T>& work, int64_t task) {
    const int64_t b = task / tiles.count;
    const Tile tile = tiles[task % tiles.count];
    const int64_t area = static_cast<int64_t>(tile.width) * tile.height, pixels = images.channels * area;
    for (int64_t s = 0; s < samples; ++s)
      work.gatherer.run(cotangents, inputs, b * samples + s, tile, [&](int64_t c, int32_t y, const T* row) {
        T* to = work.contributions + s * pixels + c * area + static_cast<int64_t>(y) * tile.width;
        copy_row(row, to, tile.width);
      });
    for (int64_t first = 0; first < pixels; first += block_pixels) {
      const int64_t wanted = pixels - first < block_pixels ? pixels - first : block_pixels;
      work.block.run({work.contributions, images.dtype}, first, pixels, samples, wanted, network);
      for (int64_t i = 0; i < wanted; ++i) {
        const int64_t c = (first + i) / area, y = (first + i) % area / tile.width, x = (first + i) % tile.width;
        raw[((b * images.channels + c) * images.height + tile.y + y) * images.width + tile.x + x] = work.block.means[i];
      }
    }
  });
}

}  // namespace

void pull_back(Values cotangents, const Inputs& inputs, Output contributions, int threads) {
  if (inputs.images.dtype == Dtype::float64) return pull<double>(cotangents, inputs, contributions, threads);
  pull<float>(cotangents, inputs, contributions, threads);
}

void pull_back_mean(Values cotangents, const Inputs& inputs, int64_t samples, void* raw, int threads) {
  if (inputs.images.dtype == Dtype::float64)
    return pull_mean(cotangents, inputs, samples, static_cast<double*>(raw), threads);
  pull_mean(cotangents, inputs, samples, static_cast<float*>(raw), threads);
}

}  // namespace dave::DAVE_ISA
