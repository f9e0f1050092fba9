// robust_mean: med = lower median of the S values c, mad = lower median of |c - med|,
//              mean of the c with |c - med| ≤ 2.5·(1.4826·mad + 1e-8).  DAVE, arXiv 2602.06613, Eq. 8.
// Its variance:  Σ_s (Σ_channels keep·(c_s - mean))² / (n̄·(n̄ - 1)), n̄ the number kept, averaged over the
//                channels.
//
// One sort serves both medians: along the sorted values |c - med| falls and then rises, so the k-th smallest deviation is
// max over i of min(|c_i - med|, |c_{i+h} - med|), h = ceil(S/2), i < h, with +∞ past the end.
#pragma once

#include "numerics.h"

namespace dave::DAVE_ISA {

template <typename T>
DAVE_HD T kept_within(T mad) {
  return mul(static_cast<T>(2.5), add(mul(static_cast<T>(1.4826), mad), static_cast<T>(1e-8)));
}

// One step of a compensated sum (Knuth's two-sum): total + carry stays exact to first order.
DAVE_HD void add_compensated(double& total, double& carry, double addend) {
  const double grown = add(total, addend);
  const double back = sub(grown, total);
  carry = add(carry, add(sub(total, sub(grown, back)), sub(addend, back)));
  total = grown;
}

// The mean from the sums over the kept values; NaN where there is a NaN or no finite median.
template <typename T>
DAVE_HD T mean_of(T median, bool any_nan, double total, double carry, double count) {
  const double carried = sub(carry, carry) == 0 ? carry : 0.0;
  const double mean = add(total, carried) / (count > 1 ? count : 1.0);
  return any_nan || sub(median, median) != 0 ? static_cast<T>(__builtin_nan("")) : static_cast<T>(mean);
}

// The deviation of one sample from the mean; 0 where it is not kept.
template <typename T>
DAVE_HD T deviation(T value, T mean, bool kept) {
  return kept ? sub(value, mean) : static_cast<T>(0);
}

// total + deviation², in float64, whose range has the squares of all floats.
template <typename T>
DAVE_HD double add_square(double total, T deviation) {
  const double wide = static_cast<double>(deviation);
  return add(total, mul(wide, wide));
}

// The variance from the sum of the squares and the number kept in all channels; 0 for one a channel, NaN for NaN.
DAVE_HD double variance_of(double squares, double kept, int64_t channels) {
  const double number = kept / static_cast<double>(channels);
  return number <= 1 ? 0.0 : squares / mul(number, sub(number, 1.0));
}

struct Exchange {
  int32_t low, high;
};

// Batcher's odd-even merge sort of n values: visit(low, high) for each of its compare-exchanges, in their order. Source:
// Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M's network.
template <class Visit>
constexpr void sorting_network(int64_t n, const Visit& visit) {
  for (int64_t p = 1; p < n; p *= 2)
    for (int64_t k = p; k >= 1; k /= 2)
      for (int64_t j = k % p; j + k < n; j += 2 * k)
        for (int64_t i = j; i < j + k && i + k < n; ++i)
          if (i / (2 * p) == (i + k) / (2 * p)) visit(static_cast<int32_t>(i), static_cast<int32_t>(i + k));
}

constexpr int64_t exchanges_of(int64_t n) {
  int64_t count = 0;
  sorting_network(n, [&](int32_t, int32_t) { ++count; });
  return count;
}

}  // namespace dave::DAVE_ISA
