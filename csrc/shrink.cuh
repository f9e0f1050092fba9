// shrink on a GPU: one kernel over tiles of pixels, m² and the variance with a border in shared memory.
#pragma once

#include "map_tiles.cuh"
#include "shrink.h"

namespace dave::DAVE_ISA {

template <typename T>
struct Shrink : MapTiles {
  static constexpr int wide = tile_x + 2 * blur_radius, high = tile_y + 2 * blur_radius;
  const char* name = "shrink";
  const T* raw;
  const double* variance;
  T* shrunk;
  double weights[blur_taps];

  struct Memory {
    double power[high][wide], noise[high][wide], power_across[high][tile_x], noise_across[high][tile_x];
  };
  static constexpr int shared_bytes = sizeof(Memory);

  Shrink(const Images& from, const double* of, void* to)
      : MapTiles(from), raw(static_cast<const T*>(from.data)), variance(of), shrunk(static_cast<T*>(to)) {
    gaussian_weights(window_sigma, weights);
  }

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    const auto at = tile(block.index());
    const int64_t plane = static_cast<int64_t>(height) * width;
    Memory* memory = block.template shared<Memory>();
    block.each([&](int thread) {
      for (int i = thread; i < wide * high; i += threads) {
        const int32_t x = at.x + i % wide - blur_radius, y = at.y + i / wide - blur_radius;
        const bool there = inside(x, y);
        memory->power[i / wide][i % wide] = there ? power_of(raw + channel(at.image, 0, x, y), plane, channels) : 0;
        memory->noise[i / wide][i % wide] = there ? variance[pixel(at.image, x, y)] : 0;
      }
    });
    block.sync();
    block.each([&](int thread) {
      for (int i = thread; i < high * tile_x; i += threads) {
        const int x = i % tile_x, y = i / tile_x;
        memory->power_across[y][x] = blur(&memory->power[y][x], 1, weights);
        memory->noise_across[y][x] = blur(&memory->noise[y][x], 1, weights);
      }
    });
    block.sync();
    block.each([&](int thread) {
      each_pixel(thread, at, [&](int x, int y) {
        const double power = blur(&memory->power_across[y][x], tile_x, weights);
        const double noise = blur(&memory->noise_across[y][x], tile_x, weights);
        const T factor = static_cast<T>(shrinking_factor(power, noise));
        for (int32_t c = 0; c < channels; ++c) {
          const int64_t place = channel(at.image, c, at.x + x, at.y + y);
          shrunk[place] = mul(raw[place], factor);
        }
      });
    });
  }

 private:
  DAVE_DEVICE int64_t channel(uint32_t image, int32_t c, int32_t x, int32_t y) const {
    return ((static_cast<int64_t>(image) * channels + c) * height + y) * width + x;
  }
};

}  // namespace dave::DAVE_ISA
