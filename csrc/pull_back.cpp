// Host drivers of pull_back, and of pull_back_mean: robust_mean(pull_back(...)), one tile of source pixels at a time, so
// that a thread stores the contributions of all samples for a single tile.
#include "block_mean.h"
#include "gather.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
void pull(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
          void* contributions, Dtype stored, int threads) {
  const Tiling tiles(images);
  const PerThread<Gatherer<T>> gatherers(threads, images, Gatherer<T>::largest_window(images, draws));
#pragma omp parallel num_threads(threads)
  {
    Gatherer<T>& gatherer = gatherers.mine();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < draws.rows * tiles.count; ++task) {
      const int64_t r = task / tiles.count;
      const Tile tile = tiles[task % tiles.count];
      gatherer.run(cotangents, given, images, draws, patch, r, tile, [&](int64_t c, int32_t y, const T* row) {
        const int64_t at = ((r * images.channels + c) * images.height + tile.y + y) * images.width + tile.x;
        store_row(row, contributions, stored, at, tile.width);
      });
    }
  }
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
void pull_mean(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
               int64_t samples, T* raw, int threads) {
  const Tiling tiles(images);
  const Network network(samples);
  const PerThread<TileMean<T>> works(threads, images, Gatherer<T>::largest_window(images, draws), samples);
#pragma omp parallel num_threads(threads)
  {
    TileMean<T>& work = works.mine();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < draws.rows / samples * tiles.count; ++task) {
      const int64_t b = task / tiles.count;
      const Tile tile = tiles[task % tiles.count];
      const int64_t area = static_cast<int64_t>(tile.width) * tile.height, pixels = images.channels * area;
      for (int64_t s = 0; s < samples; ++s)
        work.gatherer.run(cotangents, given, images, draws, patch, b * samples + s, tile,
                          [&](int64_t c, int32_t y, const T* row) {
                            T* to = work.contributions + s * pixels + c * area + static_cast<int64_t>(y) * tile.width;
                            copy_row(row, to, tile.width);
                          });
      for (int64_t first = 0; first < pixels; first += block_pixels) {
        const int64_t wanted = pixels - first < block_pixels ? pixels - first : block_pixels;
        work.block.run(work.contributions, images.dtype, first, pixels, samples, wanted, network);
        for (int64_t i = 0; i < wanted; ++i) {
          const int64_t c = (first + i) / area, y = (first + i) % area / tile.width, x = (first + i) % tile.width;
          raw[((b * images.channels + c) * images.height + tile.y + y) * images.width + tile.x + x] = work.block.means[i];
        }
      }
    }
  }
}

}  // namespace

void pull_back(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
               void* contributions, Dtype stored, int threads) {
  if (draws.rows == 0) return;
  if (images.dtype == Dtype::float64)
    return pull<double>(cotangents, given, images, draws, patch, contributions, stored, threads);
  pull<float>(cotangents, given, images, draws, patch, contributions, stored, threads);
}

void pull_back_mean(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
                    int64_t samples, void* raw, int threads) {
  if (draws.rows == 0) return;
  if (images.dtype == Dtype::float64)
    return pull_mean(cotangents, given, images, draws, patch, samples, static_cast<double*>(raw), threads);
  pull_mean(cotangents, given, images, draws, patch, samples, static_cast<float*>(raw), threads);
}

}  // namespace dave::DAVE_ISA
