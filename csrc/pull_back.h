// pull_back: c(q) = (signal·Σ_p g(p)·h(source_x(p) - q_x)·h(source_y(p) - q_y))·image(q)
//
// q source pixel, p the destinations that see it, g their cotangent, h the tent: the adjoint of perturb's signal part.
// DAVE, arXiv 2602.06613, Eq. 6-8. Such p lie in an open parallelogram around the inverse map of q with half extents
// `reach`, the L1 row norms of the inverse, so `candidates` an axis include them all, the first of them clamped to
// [0, size].
#pragma once

#include "warp.h"

namespace dave::DAVE_ISA {

DAVE_HD int32_t candidates(double reach, int32_t size) {
  const double count = ceil(2 * reach);
  return count < size ? static_cast<int32_t>(count) : size;
}

// The first of the candidates along one axis, for the inverse-mapped position `centre`.
template <typename T>
DAVE_HD int32_t first_candidate(T centre, T reach, int32_t size) {
  return floor_to_int(clamp(sub(centre, reach), static_cast<T>(-1), static_cast<T>(size - 1))) + 1;
}

// The weight between destination (px, py) and source (qx, qy).
template <typename T>
DAVE_HD T tap_weight(const Affine<T>& map, T px, T py, T qx, T qy) {
  return mul(tent(sub(map.x(px, py), qx)), tent(sub(map.y(px, py), qy)));
}

// One draw's warp, its inverse, and the candidates of the gather.
template <typename T>
struct Gather {
  Affine<T> map, inverse;
  T reach_x, reach_y;
  int32_t candidates_x, candidates_y;

  DAVE_HD Gather(const double* matrix, int32_t height, int32_t width)
      : Gather(matrix, Inverse(matrix), height, width) {}
  DAVE_HD Gather(const double* matrix, const Inverse& inverted, int32_t height, int32_t width)
      : map(matrix), inverse(inverted.matrix), reach_x(static_cast<T>(inverted.reach_x)),
        reach_y(static_cast<T>(inverted.reach_y)), candidates_x(candidates(inverted.reach_x, width)),
        candidates_y(candidates(inverted.reach_y, height)) {}
};

}  // namespace dave::DAVE_ISA
