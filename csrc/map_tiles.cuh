// Maps of a batch divided into tiles of pixels, a block each: for kernels that read a pixel's neighbours.
#pragma once

#include "grid.h"

namespace dave::DAVE_ISA {

struct MapTiles {
  static constexpr int threads = 256, resident = 1, tile_x = 32, tile_y = 16;
  int64_t count;
  int32_t channels, height, width;
  Divider tiles_x, tiles;

  explicit MapTiles(const Images& of)
      : count(of.count), channels(static_cast<int32_t>(of.channels)), height(static_cast<int32_t>(of.height)),
        width(static_cast<int32_t>(of.width)), tiles_x(blocks_of(of.width, tile_x)),
        tiles(blocks_of(of.width, tile_x) * blocks_of(of.height, tile_y)) {}

  int64_t blocks() const { return count * tiles.divisor; }

  struct Tile {
    uint32_t image;
    int32_t x, y;
    bool first;
  };
  DAVE_DEVICE Tile tile(int64_t block) const {
    uint32_t in_image = static_cast<uint32_t>(block);
    const uint32_t image = tiles.split(in_image);
    uint32_t column = in_image;
    const uint32_t row = tiles_x.split(column);
    return {image, static_cast<int32_t>(column) * tile_x, static_cast<int32_t>(row) * tile_y, in_image == 0};
  }
  DAVE_DEVICE bool inside(int32_t x, int32_t y) const {
    return static_cast<uint32_t>(x) < static_cast<uint32_t>(width) && static_cast<uint32_t>(y) < static_cast<uint32_t>(height);
  }
  DAVE_DEVICE int64_t pixel(uint32_t image, int32_t x, int32_t y) const {
    return (static_cast<int64_t>(image) * height + y) * width + x;
  }
  // Calls f(x, y) for a thread's pixels of a tile, counted from its corner.
  template <class F>
  DAVE_DEVICE void each_pixel(int thread, const Tile& at, const F& f) const {
    for (int i = thread; i < tile_x * tile_y; i += threads) {
      const int x = i % tile_x, y = i / tile_x;
      if (inside(at.x + x, at.y + y)) f(x, y);
    }
  }
};

}  // namespace dave::DAVE_ISA
