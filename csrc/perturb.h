// perturb: x̃(p) = signal·Σ_q x(q)·h(source_x(p) - q_x)·h(source_y(p) - q_y) + noise·ε(p)
//
// p destination pixel, q its four neighbours at the source, h the tent, ε the normal deviate of p.
// DAVE, arXiv 2602.06613, Eq. 6 and 7. Images are padded with zeros, one pixel at the left and top, two at the right
// and bottom, and a source position is clamped to [-1, size]: no tap needs a test of its own.
#pragma once

#include "warp.h"

namespace dave::DAVE_ISA {

constexpr int pad_before = 1, pad_after = 2;

template <typename T>
struct Taps {
  int32_t first;            // index of the upper left tap in the padded plane
  T upper_left, upper_right, lower_left, lower_right;
};

template <typename T>
DAVE_HD Taps<T> taps_at(const Affine<T>& map, T px, T py, int32_t height, int32_t width) {
  const T x = clamp(map.x(px, py), static_cast<T>(-1), static_cast<T>(width));
  const T y = clamp(map.y(px, py), static_cast<T>(-1), static_cast<T>(height));
  const int32_t left = floor_to_int(x), top = floor_to_int(y);
  const T left_weight = tent(sub(x, static_cast<T>(left))), right_weight = tent(sub(x, static_cast<T>(left + 1)));
  const T upper_weight = tent(sub(y, static_cast<T>(top))), lower_weight = tent(sub(y, static_cast<T>(top + 1)));
  const int32_t stride = width + pad_before + pad_after;
  return {(top + pad_before) * stride + left + pad_before, mul(left_weight, upper_weight),
          mul(right_weight, upper_weight), mul(left_weight, lower_weight), mul(right_weight, lower_weight)};
}

// `lower` is `upper` one row down.
template <typename T>
DAVE_HD T bilinear(const T* upper, const T* lower, int32_t first, T upper_left, T upper_right, T lower_left,
                   T lower_right) {
  const T top = add(mul(upper_left, upper[first]), mul(upper_right, upper[first + 1]));
  return add(add(top, mul(lower_left, lower[first])), mul(lower_right, lower[first + 1]));
}

}  // namespace dave::DAVE_ISA
