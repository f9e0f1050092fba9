// Compiles the numerics for a CUDA device: a check that one source serves both, never shipped. A kernel for each
// header that a device will run.
#include "perturb.h"
#include "pull_back.h"
#include "random.h"
#include "robust_mean.h"
#include "smooth.h"

namespace dave::DAVE_ISA {

__global__ void check_random(float* to, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) normal_block(i, 0, 1, 2, to[4 * i], to[4 * i + 1], to[4 * i + 2], to[4 * i + 3]);
}

template <typename T>
__global__ void check_perturb(const double* matrix, const T* plane, T* to, int height, int width) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  const Taps<T> t = taps_at(Affine<T>(matrix), static_cast<T>(x), static_cast<T>(y), height, width);
  const T* lower = plane + width + pad_before + pad_after;
  if (x < width)
    to[y * width + x] = bilinear(plane, lower, t.first, t.upper_left, t.upper_right, t.lower_left, t.lower_right);
}

template <typename T>
__global__ void check_pull_back(const double* matrix, const T* cotangent, T* to, int height, int width) {
  const T x = static_cast<T>(blockIdx.x * blockDim.x + threadIdx.x), y = static_cast<T>(blockIdx.y);
  const Inverse inverse(matrix);
  const Affine<T> map(matrix), back(inverse.matrix);
  const int px = first_candidate(back.x(x, y), static_cast<T>(inverse.reach_x), width);
  const int py = first_candidate(back.y(x, y), static_cast<T>(inverse.reach_y), height);
  const int count = candidates(inverse.reach_x, width);
  T sum = 0;
  for (int i = 0; i < count; ++i) {
    const T weight = tap_weight(map, static_cast<T>(px + i), static_cast<T>(py), x, y);
    sum = add(sum, mul(weight, cotangent[py * width + px + i]));
  }
  to[static_cast<int>(y) * width + static_cast<int>(x)] = sum;
}

template <typename T>
__global__ void check_rest(const T* from, T* to, bfloat16* stored, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  double total = 0, carry = 0;
  add_compensated(total, carry, static_cast<double>(kept_within(from[i])));
  to[i] = add(bilateral_weight(static_cast<T>(-1), from[i]), static_cast<T>(add(total, carry)));
  put(stored[i], to[i]);
}

template __global__ void check_perturb<float>(const double*, const float*, float*, int, int);
template __global__ void check_perturb<double>(const double*, const double*, double*, int, int);
template __global__ void check_pull_back<float>(const double*, const float*, float*, int, int);
template __global__ void check_pull_back<double>(const double*, const double*, double*, int, int);
template __global__ void check_rest<float>(const float*, float*, bfloat16*, int);
template __global__ void check_rest<double>(const double*, double*, bfloat16*, int);

}  // namespace dave::DAVE_ISA
