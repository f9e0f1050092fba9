// shrink on a GPU, in two kernels over tiles of pixels in shared memory: the channel sum and its detail; the sums of power
// and variance, one after the other in the same memory, and the result.
#pragma once

#include "map_tiles.cuh"
#include "shrink.h"

namespace dave::DAVE_ISA {

// m, and d = m - μ.
template <typename T>
struct Detail : MapTiles {
  static constexpr int wide = tile_x + 2 * mean_radius, high = tile_y + 2 * mean_radius;
  const char* name = "shrink (detail)";
  const T* raw;
  double *sums, *details;
  double weights[mean_taps];

  struct Memory {
    double sums[high][wide], across[high][tile_x];
  };
  static constexpr int shared_bytes = sizeof(Memory);

  Detail(const Images& from, double* scratch)
      : MapTiles(from), raw(static_cast<const T*>(from.data)), sums(scratch),
        details(scratch + from.count * from.height * from.width) {
    gaussian_weights<mean_radius>(mean_sigma, weights);
  }

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    const auto at = tile(block.index());
    const int64_t plane = static_cast<int64_t>(height) * width;
    Memory* memory = block.template shared<Memory>();
    block.each([&](int thread) {
      for (int i = thread; i < wide * high; i += threads) {
        const int32_t x = at.x + i % wide - mean_radius, y = at.y + i / wide - mean_radius;
        const T* from = raw + at.image * channels * plane + static_cast<int64_t>(y) * width + x;
        memory->sums[i / wide][i % wide] = inside(x, y) ? channel_sum(from, plane, channels) : 0;
      }
    });
    block.sync();
    block.each([&](int thread) {
      for (int i = thread; i < high * tile_x; i += threads)
        memory->across[i / tile_x][i % tile_x] = blur<mean_radius>(&memory->sums[i / tile_x][i % tile_x], 1, weights);
    });
    block.sync();
    block.each([&](int thread) {
      each_pixel(thread, at, [&](int x, int y) {
        const double blurred = blur<mean_radius>(&memory->across[y][x], tile_x, weights);
        const double weight = mul(weight_inside(weights, at.y + y, height), weight_inside(weights, at.x + x, width));
        const double sum = memory->sums[y + mean_radius][x + mean_radius];
        const int64_t place = pixel(at.image, at.x + x, at.y + y);
        sums[place] = sum, details[place] = sub(sum, blurred / weight);
      });
    });
  }
};

template <typename T>
struct Shrink : MapTiles {
  static constexpr int wide = tile_x + 2 * power_radius, high = tile_y + 2 * power_radius;
  const char* name = "shrink";
  const double *sums, *details, *variance;
  T* shrunk;
  double weights[power_taps];

  struct Memory {
    double given[high][wide], across[high][tile_x], found[3][tile_y][tile_x];
  };
  static constexpr int shared_bytes = sizeof(Memory);

  Shrink(const Images& from, const double* scratch, const double* of, void* to)
      : MapTiles(from), sums(scratch), details(scratch + from.count * from.height * from.width), variance(of),
        shrunk(static_cast<T*>(to)) {
    gaussian_weights<power_radius>(power_sigma, weights);
  }

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    const auto at = tile(block.index());
    Memory* memory = block.template shared<Memory>();
    window(block, at, *memory, 0, [&](int64_t place) { return mul(sums[place], sums[place]); });
    window(block, at, *memory, 1, [&](int64_t place) { return mul(details[place], details[place]); });
    window(block, at, *memory, 2, [&](int64_t place) { return variance[place]; });
    block.each([&](int thread) {
      each_pixel(thread, at, [&](int x, int y) {
        const int64_t place = pixel(at.image, at.x + x, at.y + y);
        const auto& found = memory->found;
        shrunk[place] =
            static_cast<T>(shrunk_sum(sums[place], details[place], found[0][y][x], found[1][y][x], found[2][y][x]));
      });
    });
  }

 private:
  // G of the values at places of the image, into found[which].
  template <class Block, class Values>
  DAVE_DEVICE void window(const Block& block, const Tile& at, Memory& memory, int which, const Values& values) const {
    block.each([&](int thread) {
      for (int i = thread; i < wide * high; i += threads) {
        const int32_t x = at.x + i % wide - power_radius, y = at.y + i / wide - power_radius;
        memory.given[i / wide][i % wide] = inside(x, y) ? values(pixel(at.image, x, y)) : 0;
      }
    });
    block.sync();
    block.each([&](int thread) {
      for (int i = thread; i < high * tile_x; i += threads)
        memory.across[i / tile_x][i % tile_x] = blur<power_radius>(&memory.given[i / tile_x][i % tile_x], 1, weights);
    });
    block.sync();
    block.each([&](int thread) {
      for (int i = thread; i < tile_x * tile_y; i += threads)
        memory.found[which][i / tile_x][i % tile_x] =
            blur<power_radius>(&memory.across[i / tile_x][i % tile_x], tile_x, weights);
    });
    block.sync();
  }
};

}  // namespace dave::DAVE_ISA
