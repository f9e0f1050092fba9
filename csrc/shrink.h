// shrink: raw·max(G*m² - G*variance, 0) / (G*m²),  m = Σ_channels raw
//
// G a Gaussian of σ = 1.5 pixels over an 11×11 window; zeros outside, in both windows. Everything but the last product is
// in float64, whose range has the squares of all floats.
#pragma once

#include "blur.h"

namespace dave::DAVE_ISA {

constexpr double window_sigma = 1.5;

// The share of `power` that is not noise; NaN where either is NaN, 0 where there is no power.
DAVE_HD double shrinking_factor(double power, double noise) {
  const double signal = sub(power, noise);
  return (signal < 0 ? 0.0 : signal) / (power == 0 ? 1.0 : power);
}

// m² of a pixel, whose channels are `plane` apart.
template <typename T>
DAVE_HD double power_of(const T* raw, int64_t plane, int64_t channels) {
  double sum = static_cast<double>(raw[0]);
  for (int64_t c = 1; c < channels; ++c) sum = add(sum, static_cast<double>(raw[c * plane]));
  return mul(sum, sum);
}

}  // namespace dave::DAVE_ISA
