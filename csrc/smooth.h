// smooth: m = relu(Σ_channels raw);  m = ½·(m + G(m));  m(p) = Σ_q w·m(q) / Σ_q w;  m = m / max m
//
// G the normalised 11×11 Gaussian of σ = 7, w = exp(-|p - q|²/2σ_s² - (m(p) - m(q))²/2σ_r²) over 5×5 neighbours with
// σ_s = 0.5, σ_r = 0.05; zeros outside, which take part in the sums.
#pragma once

#include "blur.h"

namespace dave::DAVE_ISA {

constexpr int blur_radius = 5, bilateral_radius = 2;
constexpr int blur_taps = 2 * blur_radius + 1;
constexpr double blur_sigma = 7.0, spatial_sigma = 0.5, range_sigma = 0.05;

// exp x for x ≤ 0 in float32, to 2 ulp; 0 below the smallest normal number; NaN stays NaN.
DAVE_HD float exp_of_nonpositive(float x) {
  constexpr float tail_of[] = {0.5f, 0.16666514f, 0.041666187f, 0.008369591f, 0.0013951703f};
  constexpr float lowest = -87.3f;
  // 1.5·2²³: adding it rounds to an integer and leaves that integer in the low bits
  constexpr float rounder = 12582912.0f;
  const float bounded = x < lowest ? lowest : x;
  const float shifted = add(mul(bounded, 1.44269504f), rounder);
  const float power = sub(shifted, rounder);
  const float r = sub(sub(bounded, mul(power, 0.693359375f)), mul(power, -2.1219444e-4f));
  const float value = add(add(mul(mul(horner(r, tail_of, 5), r), r), r), 1.0f);
  const float scale = number_of((bits_of(shifted) - bits_of(rounder) + 127u) << 23);
  return x < lowest ? 0.0f : mul(value, scale);
}

DAVE_HD double exp_of_nonpositive(double x) { return exp(x); }

template <typename T>
DAVE_HD T bilateral_weight(T distance_term, T difference) {
  constexpr T range_factor = static_cast<T>(0.5 / (range_sigma * range_sigma));
  return exp_of_nonpositive(sub(distance_term, mul(mul(difference, difference), range_factor)));
}

// -|p - q|²/2σ_s² for neighbours dx, dy apart.
template <typename T>
DAVE_HD T bilateral_distance(int dx, int dy) {
  return static_cast<T>(-(dx * dx + dy * dy) / (2 * spatial_sigma * spatial_sigma));
}

}  // namespace dave::DAVE_ISA
