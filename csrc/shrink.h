// shrink: (μ + d·max(1 - V/(G*d²), 0))·max(1 - V/(G*m²), 0),  m = Σ_channels raw, μ its local mean, d = m - μ, V = G*variance
//
// μ by a Gaussian of σ = 1 pixel over the part of its 9×9 window inside of the image; G a Gaussian of σ = 5 pixels over
// 31×31, with zeros outside. Everything is in float64, whose range has the squares of all floats.
#pragma once

#include "blur.h"

namespace dave::DAVE_ISA {

constexpr int mean_radius = 4, power_radius = 15;
constexpr int mean_taps = 2 * mean_radius + 1, power_taps = 2 * power_radius + 1;
constexpr double mean_sigma = 1.0, power_sigma = 5.0;

// The share of `power` that is not noise; NaN where either is NaN, 0 where there is no power.
DAVE_HD double share_of_signal(double power, double noise) {
  const double signal = sub(power, noise);
  return (signal < 0 ? 0.0 : signal) / (power == 0 ? 1.0 : power);
}

// From m, d and the three windows' sums to the result.
DAVE_HD double shrunk_sum(double sum, double detail, double power, double detail_power, double noise) {
  const double local = sub(sum, detail);
  return mul(add(local, mul(detail, share_of_signal(detail_power, noise))), share_of_signal(power, noise));
}

// m of a pixel, whose channels are `plane` apart.
template <typename T>
DAVE_HD double channel_sum(const T* raw, int64_t plane, int64_t channels) {
  double sum = static_cast<double>(raw[0]);
  for (int64_t c = 1; c < channels; ++c) sum = add(sum, static_cast<double>(raw[c * plane]));
  return sum;
}

// The sum of the weights of μ at position `at` of an axis that lie inside of the image.
DAVE_HD double weight_inside(const double* weights, int64_t at, int64_t size) {
  double sum = 0;
  DAVE_UNROLL
  for (int k = 0; k < mean_taps; ++k) {
    const int64_t there = at + k - mean_radius;
    sum = add(sum, there >= 0 && there < size ? weights[k] : 0.0);
  }
  return sum;
}

}  // namespace dave::DAVE_ISA
