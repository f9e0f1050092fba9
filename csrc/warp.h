// The affine bilinear warp's geometry, shared by perturb and its adjoint pull_back.
//
//   source(x, y) = (m00·x + (m01·y + m02), m10·x + (m11·y + m12))      h(u) = max(0, 1 - |u|)
//
// Both compute every weight h(source - q) here, rounded in the same order, so that each is the exact adjoint of the
// other. dave_fast/ops/_warp.py is the same in PyTorch.
#pragma once

#include "numerics.h"

namespace dave::DAVE_ISA {

template <typename T>
struct Affine {
  T m00, m01, m02, m10, m11, m12;

  DAVE_HD explicit Affine(const double* m)
      : m00(static_cast<T>(m[0])), m01(static_cast<T>(m[1])), m02(static_cast<T>(m[2])),
        m10(static_cast<T>(m[3])), m11(static_cast<T>(m[4])), m12(static_cast<T>(m[5])) {}
  DAVE_HD T x(T px, T py) const { return add(mul(m00, px), add(mul(m01, py), m02)); }
  DAVE_HD T y(T px, T py) const { return add(mul(m10, px), add(mul(m11, py), m12)); }
};

// The largest magnitude of a map's entries: positions stay finite in both precisions.
constexpr double largest_entry = 0x1p60;

// Whether the entries of a map (2, 3) are within that; false for NaN.
DAVE_HD bool is_bounded(const double* m) {
  for (int i = 0; i < 6; ++i)
    if (!(magnitude(m[i]) <= largest_entry)) return false;
  return true;
}

template <typename T>
DAVE_HD T tent(T u) {
  const T height = sub(static_cast<T>(1), magnitude(u));
  return height > 0 ? height : static_cast<T>(0);
}

// The inverse map, source → destination, and the L1 norms of its rows, in float64.
struct Inverse {
  double matrix[6];
  double reach_x, reach_y;

  DAVE_HD explicit Inverse(const double* m) {
    const double determinant = sub(mul(m[0], m[4]), mul(m[1], m[3]));
    matrix[0] = m[4] / determinant, matrix[1] = -m[1] / determinant;
    matrix[3] = -m[3] / determinant, matrix[4] = m[0] / determinant;
    matrix[2] = -add(mul(matrix[0], m[2]), mul(matrix[1], m[5]));
    matrix[5] = -add(mul(matrix[3], m[2]), mul(matrix[4], m[5]));
    reach_x = add(magnitude(matrix[0]), magnitude(matrix[1]));
    reach_y = add(magnitude(matrix[3]), magnitude(matrix[4]));
  }
};

}  // namespace dave::DAVE_ISA
