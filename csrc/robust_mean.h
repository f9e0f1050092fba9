// robust_mean: med = lower median of the S values c, mad = lower median of |c - med|,
//              mean of the c with |c - med| ≤ 2.5·(1.4826·mad + 1e-8).  DAVE, arXiv 2602.06613, Eq. 8.
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

}  // namespace dave::DAVE_ISA
