// Gaussian blurs of `radius`, one axis after the other, of planes padded with zeros: the filters of shrink and of smooth.
#pragma once

#include "numerics.h"

namespace dave::DAVE_ISA {

// The normalised 2·radius + 1 weights of one axis.
template <int radius, typename T>
void gaussian_weights(double sigma, T* weights) {
  double values[2 * radius + 1], total = 0;
  for (int k = 0; k <= 2 * radius; ++k) {
    const double distance = (k - radius) / sigma;
    total += values[k] = exp(-0.5 * distance * distance);
  }
  for (int k = 0; k <= 2 * radius; ++k) weights[k] = static_cast<T>(values[k] / total);
}

// The weighted sum of 2·radius + 1 values, `step` apart.
template <int radius, typename T>
DAVE_HD T blur(const T* from, int step, const T* weights) {
  T sum = 0;
  DAVE_UNROLL
  for (int k = 0; k <= 2 * radius; ++k) sum = add(sum, mul(weights[k], from[k * step]));
  return sum;
}

}  // namespace dave::DAVE_ISA
