// pull_back on a GPU: a thread gathers one source pixel in every channel, straight from the tokens' layout; no atomics.
//
// DAVE's draws need 3×3 candidates: that path is unrolled, with independent loads; more candidates are a loop.
// Contributions are those of a span of source pixels of each plane, so that pull_back_mean can go tile by tile. Spread
// pulls back one density a patch in the same way, without the factors.
#pragma once

#include "cuda.h"
#include "grid.h"
#include "pull_back.h"

namespace dave::DAVE_ISA {

using cuda::Rows;
using cuda::Span;

// The values of one draw that all threads of a block share.
template <typename T>
struct PullBackRow {
  Gather<T> gather;
  T signal;
  int64_t image;

  DAVE_HD PullBackRow(const Draws& draws, int64_t r, int32_t height, int32_t width)
      : gather(draws.matrices + 6 * r, height, width), signal(static_cast<T>(draws.signal[r])),
        image(draws.image_index[r]) {}
};

// of_patches: the cotangents are (rows, patches), each that of all pixels of its patch, in one channel.
template <typename T, typename Given, bool of_patches>
struct Pull {
  static constexpr int threads = 128, resident = 1, shared_bytes = sizeof(PullBackRow<T>);
  // channels that share a weight: most images have at most three
  static constexpr int together = of_patches ? 1 : 3;
  const char* name = of_patches ? "spread" : "pull_back";
  const Given* cotangents;
  const T* images;
  Draws draws;
  int64_t first_row;
  Output contributions;
  int64_t count, rows;
  int32_t channels, height, width, patch_area;
  uint32_t first, pixels, token_width, tokens_a_line;
  Divider patch_height, patch_width, row_width, blocks_a_row;

  // rows: of the draws from first_row on; contributions: (rows, channels, span.pixels)
  Pull(const Given* given, const Inputs& inputs, Rows some, Span span, Output to)
      : Pull(given, inputs.images, inputs.draws, inputs.patch, some, span, to) {}
  Pull(const Given* given, const Images& of, const Draws& with, Patch patch, Rows some, Span span, Output to)
      : cotangents(given), images(static_cast<const T*>(of.data)), draws(with), first_row(some.first),
        contributions(to), count(of.count), rows(some.count),
        channels(static_cast<int32_t>(of.channels)), height(static_cast<int32_t>(of.height)),
        width(static_cast<int32_t>(of.width)), patch_area(static_cast<int32_t>(patch.height * patch.width)),
        first(static_cast<uint32_t>(span.first)), pixels(static_cast<uint32_t>(span.pixels)),
        token_width(static_cast<uint32_t>(of_patches ? 1 : of.channels * patch.height * patch.width)),
        tokens_a_line(static_cast<uint32_t>(of.width / patch.width)), patch_height(patch.height),
        patch_width(patch.width), row_width(of.width), blocks_a_row(blocks_of(span.pixels, threads)) {}

  int64_t blocks() const { return rows * blocks_a_row.divisor; }

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    PullBackRow<T>* row = block.template shared<PullBackRow<T>>();
    uint32_t chunk = static_cast<uint32_t>(block.index());
    const uint32_t r = blocks_a_row.split(chunk);
    block.each([&](int thread) {
      if (thread == 0) *row = PullBackRow<T>(draws, first_row + r, height, width);
    });
    block.sync();
    block.each([&](int thread) {
      const uint32_t pixel = chunk * threads + static_cast<uint32_t>(thread);
      if (pixel >= pixels) return;
      const bool narrow = row->gather.candidates_x <= 3 && row->gather.candidates_y <= 3;
      for (int32_t c = 0; c < channels; c += together) {
        if (narrow) pull<3>(*row, r, pixel, c);
        else pull<0>(*row, r, pixel, c);
      }
    });
  }

 private:
  // Up to `together` channels from c on; Most: a bound of the candidates of an axis, 0 for none.
  template <int Most>
  DAVE_DEVICE void pull(const PullBackRow<T>& row, uint32_t r, uint32_t pixel, int32_t c) const {
    uint32_t column = first + pixel;
    const T qy = static_cast<T>(row_width.split(column)), qx = static_cast<T>(column);
    const Gather<T>& g = row.gather;
    const int32_t px = first_candidate(g.inverse.x(qx, qy), g.reach_x, width);
    const int32_t py = first_candidate(g.inverse.y(qx, qy), g.reach_y, height);
    const int64_t plane = static_cast<int64_t>(height) * width;
    const Given* from[together];
    DAVE_UNROLL
    for (int k = 0; k < together; ++k)
      from[k] = of_patches ? cotangents + (first_row + r) * (plane / patch_area)
                           : cotangents + (first_row + r) * channels * plane +
                                 static_cast<int64_t>(c + k < channels ? c + k : c) * patch_area;
    T sums[together] = {};
    // offsets of the candidates' columns among the tokens, computed once where they are few enough for registers
    int32_t columns[Most > 0 ? Most : 1];
    DAVE_UNROLL
    for (int i = 0; i < Most; ++i) columns[i] = column_offset(px + i);
    DAVE_UNROLL_BY((Most > 0 ? Most : 1))
    for (int32_t j = 0; j < (Most > 0 ? Most : g.candidates_y); ++j) {
      const bool in_rows = j < g.candidates_y && py + j < height;
      const int32_t line = row_offset(py + j);
      DAVE_UNROLL_BY((Most > 0 ? Most : 1))
      for (int32_t i = 0; i < (Most > 0 ? Most : g.candidates_x); ++i) {
        const bool inside = in_rows && i < g.candidates_x && px + i < width;
        const T weight = tap_weight(g.map, static_cast<T>(px) + static_cast<T>(i), static_cast<T>(py) + static_cast<T>(j),
                                    qx, qy);
        // outside of the image a valid element is loaded and replaced by zero: without a branch the loads of all taps
        // overlap
        const int32_t at = inside ? line + (Most > 0 ? columns[Most > 0 ? i : 0] : column_offset(px + i)) : 0;
        DAVE_UNROLL
        for (int k = 0; k < together; ++k) {
          const T there = static_cast<T>(widen(from[k][at]));
          sums[k] = add(sums[k], mul(weight, inside ? there : static_cast<T>(0)));
        }
      }
    }
    if constexpr (of_patches) {
      store_run<1>(sums, contributions, static_cast<int64_t>(r) * pixels + pixel);
    } else {
      const bool known = row.image >= 0 && row.image < count;
      const T* image = images + (known ? row.image : 0) * channels * plane + first + pixel;
      DAVE_UNROLL
      for (int k = 0; k < together; ++k) {
        if (c + k >= channels) continue;
        T value = mul(mul(row.signal, sums[k]), image[(c + k) * plane]);
        // NaN for an image outside of the batch, which only the device can detect
        value = known ? value : static_cast<T>(__builtin_nan(""));
        store_run<1>(&value, contributions, (static_cast<int64_t>(r) * channels + c + k) * pixels + pixel);
      }
    }
  }

  // The element of channel 0 of destination (x, y) in its row of tokens is row_offset(y) + column_offset(x).
  DAVE_DEVICE int32_t column_offset(int32_t x) const {
    uint32_t in_patch = static_cast<uint32_t>(x);
    const uint32_t patch = patch_width.split(in_patch);
    return static_cast<int32_t>(patch * token_width + (of_patches ? 0 : in_patch));
  }
  DAVE_DEVICE int32_t row_offset(int32_t y) const {
    uint32_t in_patch = static_cast<uint32_t>(y);
    const uint32_t patch = patch_height.split(in_patch);
    const uint32_t line = of_patches ? 0 : in_patch * patch_width.divisor;
    return static_cast<int32_t>(patch * tokens_a_line * token_width + line);
  }
};

template <typename T, typename Given>
struct PullBack : Pull<T, Given, false> {
  using Pull<T, Given, false>::Pull;
};

template <typename T>
struct Spread : Pull<T, T, true> {
  using Pull<T, T, true>::Pull;
};

}  // namespace dave::DAVE_ISA
