// pull_back's gather on the host, one tile of source pixels at a time, after un-patchifying its destinations.
#pragma once

#include "host.h"
#include "pull_back.h"

namespace dave::DAVE_ISA {
namespace {

// Source pixels that are gathered together: rows long enough for vectors, destinations that stay in a cache.
constexpr int32_t tile_width = 64, tile_height = 32;

struct Tile {
  int32_t x, y, width, height;
};

// The tiles of an image; the last of a row or column may be smaller.
struct Tiling {
  int32_t height, width, columns;
  int64_t count;

  explicit Tiling(const Images& images)
      : height(static_cast<int32_t>(images.height)), width(static_cast<int32_t>(images.width)),
        columns((width + tile_width - 1) / tile_width),
        count(static_cast<int64_t>(columns) * ((height + tile_height - 1) / tile_height)) {}

  Tile operator[](int64_t i) const {
    const int32_t x = static_cast<int32_t>(i % columns) * tile_width, y = static_cast<int32_t>(i / columns) * tile_height;
    return {x, y, width - x < tile_width ? width - x : tile_width, height - y < tile_height ? height - y : tile_height};
  }
};

// The destinations of a tile's taps; those outside of the image are stored as zeros, so that taps need no bounds check.
struct Window {
  int32_t x, y, width, height;

  template <typename T>
  Window(const Gather<T>& g, const Tile& tile, int32_t image_height, int32_t image_width) {
    int32_t left = image_width, right = -1, top = image_height, bottom = -1;
    // positions are monotonic in both coordinates, also when rounded: the corners are the extremes
    for (int corner = 0; corner < 4; ++corner) {
      const T qx = static_cast<T>(tile.x + (corner & 1 ? tile.width - 1 : 0));
      const T qy = static_cast<T>(tile.y + (corner & 2 ? tile.height - 1 : 0));
      const int32_t px = first_candidate(g.inverse.x(qx, qy), g.reach_x, image_width);
      const int32_t py = first_candidate(g.inverse.y(qx, qy), g.reach_y, image_height);
      left = px < left ? px : left, right = px > right ? px : right;
      top = py < top ? py : top, bottom = py > bottom ? py : bottom;
    }
    x = left, y = top;
    width = right - left + g.candidates_x, height = bottom - top + g.candidates_y;
  }
};

// The pieces of the columns from x to stop that lie in one patch, as f(patch column, x, columns).
template <typename F>
void each_piece(int64_t x, int64_t stop, int64_t patch_width, const F& f) {
  while (x < stop) {
    const int64_t column = x / patch_width, end = (column + 1) * patch_width;
    const int64_t next = end < stop ? end : stop;
    f(column, x, next - x);
    x = next;
  }
}

// What is pulled back: load gives draw r's cotangents at columns x to stop of row (c, y) of the destinations, scale
// multiplies a row of a tile's source pixels by their factors.

// Cotangents of tokens; the factors are the signal and the image.
template <typename T>
struct OfTokens {
  Values cotangents;
  const Inputs& inputs;

  void load(int64_t r, int64_t c, int64_t y, int64_t x, int64_t stop, T* to) const {
    const TokenRow from(inputs.images, inputs.patch, r, c, y);
    const int64_t patch_width = inputs.patch.width, begin = x;
    each_piece(x, stop, patch_width, [&](int64_t column, int64_t at, int64_t n) {
      load_row(cotangents, from.first + column * from.step + at % patch_width, to + (at - begin), n);
    });
  }
  void scale(int64_t r, int64_t c, const Tile& tile, int32_t y, T* row) const {
    const Images& images = inputs.images;
    const T signal = static_cast<T>(inputs.draws.signal[r]);
    const int64_t plane = inputs.draws.image_index[r] * images.channels + c;
    const T* image = static_cast<const T*>(images.data) + (plane * images.height + tile.y + y) * images.width + tile.x;
    for (int32_t x = 0; x < tile.width; ++x) row[x] = mul(mul(signal, row[x]), image[x]);
  }
};

// One density a patch, that of all its pixels; no factors. Of the images only the sizes are read, of the draws the
// matrices.
template <typename T>
struct OfPatches {
  Values densities;
  const Inputs& inputs;

  void load(int64_t r, int64_t, int64_t y, int64_t x, int64_t stop, T* to) const {
    const auto& [images, draws, patch] = inputs;
    const int64_t row = r * (images.height / patch.height) + y / patch.height, begin = x;
    const T* from = static_cast<const T*>(densities.data) + row * (images.width / patch.width);
    each_piece(x, stop, patch.width, [&](int64_t column, int64_t at, int64_t n) {
      for (int64_t i = at - begin; i < at - begin + n; ++i) to[i] = from[column];
    });
  }
  void scale(int64_t, int64_t, const Tile&, int32_t, T*) const {}
};

// The scratch memory of one thread: the window of one draw's cotangents and the arrays of one row of a tile.
template <typename T>
class Gatherer {
 public:
  Gatherer(const Images& images, int64_t window)
      : window_(images.channels * window), pulled_(images.channels * tile_width), first_x_(tile_width),
        first_y_(tile_width), weight_(tile_width), first_(tile_width) {}

  // The largest window, in elements of one channel, of any tile of any draw.
  static int64_t largest_window(const Images& images, const Draws& draws) {
    const Tiling tiles(images);
    int64_t largest = 0;
    for (int64_t r = 0; r < draws.rows; ++r) {
      const Gather<T> g(draws.matrices + 6 * r, tiles.height, tiles.width);
      for (int64_t i = 0; i < tiles.count; ++i) {
        const Window window(g, tiles[i], tiles.height, tiles.width);
        const int64_t size = static_cast<int64_t>(window.width) * window.height;
        largest = size > largest ? size : largest;
      }
    }
    return largest;
  }

  // Contributions of draw r at a tile, as store(channel, y, row of tile.width values).
  template <typename Source, typename Store>
  void run(const Source& source, int64_t r, const Tile& tile, const Store& store) {
    const auto& [images, draws, patch] = source.inputs;
    const int32_t height = static_cast<int32_t>(images.height), width = static_cast<int32_t>(images.width);
    const Gather<T> g(draws.matrices + 6 * r, height, width);
    const Window window(g, tile, height, width);
    fill(source, images, r, window);
    for (int32_t y = 0; y < tile.height; ++y) {
      pull_row(g, tile, static_cast<T>(tile.y + y), window, height, width, images.channels);
      for (int64_t c = 0; c < images.channels; ++c) {
        T* row = pulled_ + c * tile_width;
        source.scale(r, c, tile, y, row);
        store(c, y, row);
      }
    }
  }

 private:
  template <typename Source>
  void fill(const Source& source, const Images& images, int64_t r, const Window& window) {
    const int64_t right = window.x + window.width < images.width ? window.x + window.width : images.width;
    T* to = window_;
    for (int64_t c = 0; c < images.channels; ++c)
      for (int32_t y = window.y; y < window.y + window.height; ++y, to += window.width) {
        int64_t x = window.x;
        if (y < images.height && x < right) {
          source.load(r, c, y, x, right, to);
          x = right;
        }
        for (; x < window.x + window.width; ++x) to[x - window.x] = 0;
      }
  }

  void pull_row(const Gather<T>& g, const Tile& tile, T qy, const Window& window, int32_t height, int32_t width,
                int64_t channels) {
    const int64_t plane = static_cast<int64_t>(window.width) * window.height;
    locate(g, tile, qy, window, height, width);
    for (int64_t x = 0; x < channels * tile_width; ++x) pulled_[x] = 0;
    for (int32_t j = 0; j < g.candidates_y; ++j)
      for (int32_t i = 0; i < g.candidates_x; ++i) {
        weigh(g, i, j, tile, qy);
        for (int64_t c = 0; c < channels; ++c)
          gather(window_ + c * plane + j * window.width + i, pulled_ + c * tile_width, tile.width);
      }
  }

  void locate(const Gather<T>& g, const Tile& tile, T qy, const Window& window, int32_t height, int32_t width) {
#pragma omp simd
    for (int32_t x = 0; x < tile.width; ++x) {
      const T qx = static_cast<T>(tile.x + x);
      const int32_t px = first_candidate(g.inverse.x(qx, qy), g.reach_x, width);
      const int32_t py = first_candidate(g.inverse.y(qx, qy), g.reach_y, height);
      first_x_[x] = static_cast<T>(px), first_y_[x] = static_cast<T>(py);
      first_[x] = (py - window.y) * window.width + (px - window.x);
    }
  }

  void weigh(const Gather<T>& g, int32_t i, int32_t j, const Tile& tile, T qy) {
#pragma omp simd
    for (int32_t x = 0; x < tile.width; ++x)
      weight_[x] = tap_weight(g.map, first_x_[x] + static_cast<T>(i), first_y_[x] + static_cast<T>(j),
                              static_cast<T>(tile.x + x), qy);
  }

  void gather(const T* tap, T* sums, int32_t width) const {
#pragma omp simd
    for (int32_t x = 0; x < width; ++x) sums[x] = add(sums[x], mul(weight_[x], tap[first_[x]]));
  }

  Scratch<T> window_, pulled_, first_x_, first_y_, weight_;
  Scratch<int32_t> first_;
};

}  // namespace
}  // namespace dave::DAVE_ISA
