// Planes on the host with a border of zeros, and blurs of their rows.
#pragma once

#include "blur.h"
#include "host.h"

namespace dave::DAVE_ISA {
namespace {

// One image's plane (height, width) with a border wide enough for a blur.
template <typename T, int radius>
struct Plane {
  int64_t height, width, stride;
  Scratch<T> data;

  Plane(int64_t height_, int64_t width_)
      : height(height_), width(width_), stride(width_ + 2 * radius), data((height_ + 2 * radius) * stride) {
    for (int64_t i = 0; i < (height + 2 * radius) * stride; ++i) data[i] = 0;
  }
  T* row(int64_t y) const { return data + (y + radius) * stride + radius; }
};

// The blur along one axis; `step` is the distance between neighbours on it.
template <int radius, typename T>
void blur_row(const T* from, int64_t step, const T* weights, T* to, int64_t width) {
  for (int64_t x = 0; x < width; ++x) to[x] = 0;
  for (int k = 0; k <= 2 * radius; ++k)
    for (int64_t x = 0; x < width; ++x) to[x] = add(to[x], mul(weights[k], from[(k - radius) * step + x]));
}

}  // namespace
}  // namespace dave::DAVE_ISA
