// smooth on a GPU, in three kernels over tiles of pixels in shared memory: channel sum, ReLU and blurred half; bilateral
// filter and the tile's maximum; division by the image's. A maximum does not depend on the order, so the atomic one is
// reproducible.
#pragma once

#include "map_tiles.cuh"
#include "smooth.h"

namespace dave::DAVE_ISA {

template <typename T>
struct SmoothArguments : MapTiles {
  const T* raw;
  T *blended, *maps;
  // the images' maxima, as the bits of numbers that are not negative: these compare as the numbers do, NaN the largest
  Bits<T>* peaks;

  SmoothArguments(const Images& from, void* scratch, void* to)
      : MapTiles(from), raw(static_cast<const T*>(from.data)), blended(static_cast<T*>(scratch)),
        maps(static_cast<T*>(to)),
        peaks(reinterpret_cast<Bits<T>*>(static_cast<T*>(scratch) + from.count * from.height * from.width)) {}
};

// m = relu(Σ_channels raw), ½·(m + G(m)).
template <typename T>
struct Blend : SmoothArguments<T> {
  using Base = SmoothArguments<T>;
  static constexpr int wide = Base::tile_x + 2 * blur_radius, high = Base::tile_y + 2 * blur_radius;
  const char* name = "smooth (blend)";
  T weights[blur_taps];

  struct Memory {
    T positive[high][wide], across[high][Base::tile_x];
  };

  explicit Blend(const Base& arguments) : Base(arguments) { gaussian_weights<blur_radius>(blur_sigma, weights); }
  static constexpr int shared_bytes = sizeof(Memory);

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    const auto at = this->tile(block.index());
    Memory* memory = block.template shared<Memory>();
    block.each([&](int thread) {
      if (at.first && thread == 0) this->peaks[at.image] = 0;
      for (int i = thread; i < wide * high; i += Base::threads)
        memory->positive[i / wide][i % wide] =
            positive(at.image, at.x + i % wide - blur_radius, at.y + i / wide - blur_radius);
    });
    block.sync();
    block.each([&](int thread) {
      for (int i = thread; i < high * Base::tile_x; i += Base::threads)
        memory->across[i / Base::tile_x][i % Base::tile_x] =
            blur<blur_radius>(&memory->positive[i / Base::tile_x][i % Base::tile_x], 1, weights);
    });
    block.sync();
    block.each([&](int thread) {
      this->each_pixel(thread, at, [&](int x, int y) {
        const T blurred = blur<blur_radius>(&memory->across[y][x], Base::tile_x, weights);
        const T own = memory->positive[y + blur_radius][x + blur_radius];
        this->blended[this->pixel(at.image, at.x + x, at.y + y)] = mul(static_cast<T>(0.5), add(own, blurred));
      });
    });
  }

 private:
  DAVE_DEVICE T positive(uint32_t image, int32_t x, int32_t y) const {
    if (!this->inside(x, y)) return 0;
    const int64_t plane = static_cast<int64_t>(this->height) * this->width;
    const T* from = this->raw + image * this->channels * plane + static_cast<int64_t>(y) * this->width + x;
    T sum = *from;
    for (int32_t c = 1; c < this->channels; ++c) sum = add(sum, from[c * plane]);
    return sum < 0 ? static_cast<T>(0) : sum;
  }
};

// m(p) = Σ_q w·m(q) / Σ_q w, and the largest of it.
template <typename T>
struct Bilateral : SmoothArguments<T> {
  using Base = SmoothArguments<T>;
  static constexpr int wide = Base::tile_x + 2 * bilateral_radius, high = Base::tile_y + 2 * bilateral_radius;
  const char* name = "smooth (bilateral)";

  struct Memory {
    T blended[high][wide];
    Bits<T> peaks[Base::threads];
  };

  explicit Bilateral(const Base& arguments) : Base(arguments) {}
  static constexpr int shared_bytes = sizeof(Memory);

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    const auto at = this->tile(block.index());
    Memory* memory = block.template shared<Memory>();
    block.each([&](int thread) {
      for (int i = thread; i < wide * high; i += Base::threads) {
        const int32_t x = at.x + i % wide - bilateral_radius, y = at.y + i / wide - bilateral_radius;
        memory->blended[i / wide][i % wide] = this->inside(x, y) ? this->blended[this->pixel(at.image, x, y)] : 0;
      }
    });
    block.sync();
    block.each([&](int thread) {
      Bits<T> peak = 0;
      this->each_pixel(thread, at, [&](int x, int y) {
        const T value = filtered(&memory->blended[y + bilateral_radius][x + bilateral_radius]);
        this->maps[this->pixel(at.image, at.x + x, at.y + y)] = value;
        peak = bits_of(value) > peak ? bits_of(value) : peak;
      });
      memory->peaks[thread] = peak;
    });
    block.sync();
    for (int half = Base::threads / 2; half > 0; half /= 2) {
      block.each([&](int thread) {
        if (thread < half && memory->peaks[thread + half] > memory->peaks[thread])
          memory->peaks[thread] = memory->peaks[thread + half];
      });
      block.sync();
    }
    block.each([&](int thread) {
      if (thread == 0) atomic_max(this->peaks + at.image, memory->peaks[0]);
    });
  }

 private:
  DAVE_DEVICE T filtered(const T* centre) const {
    T sum = 0, weights = 0;
    DAVE_UNROLL
    for (int dy = -bilateral_radius; dy <= bilateral_radius; ++dy) {
      DAVE_UNROLL
      for (int dx = -bilateral_radius; dx <= bilateral_radius; ++dx) {
        const T neighbour = centre[dy * wide + dx];
        const T weight = bilateral_weight(bilateral_distance<T>(dx, dy), sub(*centre, neighbour));
        sum = add(sum, mul(weight, neighbour));
        weights = add(weights, weight);
      }
    }
    return sum / weights;
  }
};

template <typename T>
struct Normalise : SmoothArguments<T> {
  using Base = SmoothArguments<T>;
  const char* name = "smooth (divide)";

  explicit Normalise(const Base& arguments) : Base(arguments) {}
  static constexpr int shared_bytes = 0;

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    const auto at = this->tile(block.index());
    block.each([&](int thread) {
      const T peak = number_of(this->peaks[at.image]), divisor = peak == 0 ? static_cast<T>(1) : peak;
      this->each_pixel(thread, at, [&](int x, int y) {
        T* map = this->maps + this->pixel(at.image, at.x + x, at.y + y);
        *map = *map / divisor;
      });
    });
  }
};

}  // namespace dave::DAVE_ISA
