// Host driver of smooth: one image after the other, one row a task, planes padded with zeros.
#include "smooth.h"

#include "ops.h"
#include "planes.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
void positive_part(const Images& raw, int64_t image, int64_t y, T* to) {
  const T* from = static_cast<const T*>(raw.data) + (image * raw.channels * raw.height + y) * raw.width;
  for (int64_t x = 0; x < raw.width; ++x) to[x] = from[x];
  for (int64_t c = 1; c < raw.channels; ++c)
    for (int64_t x = 0; x < raw.width; ++x) to[x] = add(to[x], from[c * raw.height * raw.width + x]);
  for (int64_t x = 0; x < raw.width; ++x) to[x] = to[x] < 0 ? 0 : to[x];
}

// `weights` is room for a row.
template <typename T>
void bilateral_row(const T* from, int64_t stride, T* weights, T* to, int64_t width) {
  for (int64_t x = 0; x < width; ++x) to[x] = weights[x] = 0;
  for (int dy = -bilateral_radius; dy <= bilateral_radius; ++dy)
    for (int dx = -bilateral_radius; dx <= bilateral_radius; ++dx) {
      const T distance_term = bilateral_distance<T>(dx, dy);
      const T* neighbour = from + dy * stride + dx;
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) {
        const T weight = bilateral_weight(distance_term, sub(from[x], neighbour[x]));
        to[x] = add(to[x], mul(weight, neighbour[x]));
        weights[x] = add(weights[x], weight);
      }
    }
  for (int64_t x = 0; x < width; ++x) to[x] = to[x] / weights[x];
}

// The row's maximum, NaN where it holds one.
template <typename T>
T peak_of(const T* row, int64_t n) {
  T peak = 0;
  for (int64_t x = 0; x < n; ++x) peak = row[x] > peak || row[x] != row[x] ? row[x] : peak;
  return peak;
}

template <typename T>
void run(const Images& raw, T* maps, int threads) {
  const int64_t height = raw.height, width = raw.width;
  T weights[blur_taps];
  gaussian_weights<blur_radius>(blur_sigma, weights);
  const Plane<T, blur_radius> positive(height, width), across(height, width), blended(height, width);
  const Scratch<T> peaks(height);
  const PerThread<Scratch<T>> rows(threads, width);
#pragma omp parallel num_threads(threads)
  for (int64_t image = 0; image < raw.count; ++image) {
    T* sums = rows.mine();
    T* map = maps + image * height * width;
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) {
      positive_part(raw, image, y, positive.row(y));
      blur_row<blur_radius, T>(positive.row(y), 1, weights, across.row(y), width);
    }
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) {
      T* row = blended.row(y);
      blur_row<blur_radius, T>(across.row(y), across.stride, weights, row, width);
      for (int64_t x = 0; x < width; ++x) row[x] = mul(static_cast<T>(0.5), add(positive.row(y)[x], row[x]));
    }
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) {
      bilateral_row<T>(blended.row(y), blended.stride, sums, map + y * width, width);
      peaks[y] = peak_of(map + y * width, width);
    }
    const T peak = peak_of<T>(peaks, height), divisor = peak == 0 ? static_cast<T>(1) : peak;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < height * width; ++i) map[i] = map[i] / divisor;
  }
}

}  // namespace

void smooth(const Images& raw, void* maps, int threads) {
  if (raw.dtype == Dtype::float64) return run(raw, static_cast<double*>(maps), threads);
  run(raw, static_cast<float*>(maps), threads);
}

}  // namespace dave::DAVE_ISA
