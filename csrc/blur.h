// Gaussian blurs, one axis after the other, of planes padded with zeros: the filters of shrink and of smooth.
#pragma once

#include "numerics.h"

namespace dave::DAVE_ISA {

constexpr int blur_radius = 5, blur_taps = 2 * blur_radius + 1;

// The normalised weights of one axis.
template <typename T>
void gaussian_weights(double sigma, T* weights) {
  double values[blur_taps], total = 0;
  for (int k = 0; k < blur_taps; ++k) {
    const double distance = (k - blur_radius) / sigma;
    total += values[k] = exp(-0.5 * distance * distance);
  }
  for (int k = 0; k < blur_taps; ++k) weights[k] = static_cast<T>(values[k] / total);
}

// The weighted sum of `blur_taps` values, `step` apart.
template <typename T>
DAVE_HD T blur(const T* from, int step, const T* weights) {
  T sum = 0;
  DAVE_UNROLL
  for (int k = 0; k < blur_taps; ++k) sum = add(sum, mul(weights[k], from[k * step]));
  return sum;
}

}  // namespace dave::DAVE_ISA
