// perturb: x̃(p) = signal·Σ_q x(q)·h(source_x(p) - q_x)·h(source_y(p) - q_y) + noise·ε(p)
//
// p destination pixel, q its four neighbours at the source, h the tent, ε the normal deviate of p; zeros outside.
// DAVE, arXiv 2602.06613, Eq. 6 and 7. A source position is clamped to [-1, size], so that all four neighbours lie
// within a border of one pixel at the left and top, two at the right and bottom.
#pragma once

#include "warp.h"

namespace dave::DAVE_ISA {

constexpr int pad_before = 1, pad_after = 2;

template <typename T>
struct Taps {
  int32_t left, top;        // the upper left tap
  T upper_left, upper_right, lower_left, lower_right;
};

template <typename T>
DAVE_HD Taps<T> taps_at(const Affine<T>& map, T px, T py, int32_t height, int32_t width) {
  const T x = clamp(map.x(px, py), static_cast<T>(-1), static_cast<T>(width));
  const T y = clamp(map.y(px, py), static_cast<T>(-1), static_cast<T>(height));
  const int32_t left = floor_to_int(x), top = floor_to_int(y);
  const T left_weight = tent(sub(x, static_cast<T>(left))), right_weight = tent(sub(x, static_cast<T>(left + 1)));
  const T upper_weight = tent(sub(y, static_cast<T>(top))), lower_weight = tent(sub(y, static_cast<T>(top + 1)));
  return {left, top, mul(left_weight, upper_weight), mul(right_weight, upper_weight), mul(left_weight, lower_weight),
          mul(right_weight, lower_weight)};
}

// The four taps' weights times their values.
template <typename T>
DAVE_HD T bilinear(T upper_left, T upper_right, T lower_left, T lower_right, T at_upper_left, T at_upper_right,
                   T at_lower_left, T at_lower_right) {
  const T top = add(mul(upper_left, at_upper_left), mul(upper_right, at_upper_right));
  return add(add(top, mul(lower_left, at_lower_left)), mul(lower_right, at_lower_right));
}

}  // namespace dave::DAVE_ISA
