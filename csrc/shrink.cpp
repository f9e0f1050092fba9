// Host driver of shrink: one image after the other, one row a task.
#include "shrink.h"

#include "ops.h"
#include "planes.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
void run(const Images& raw, const double* variance, T* shrunk, int threads) {
  const int64_t height = raw.height, width = raw.width, plane = height * width;
  double weights[blur_taps];
  gaussian_weights(window_sigma, weights);
  // m² and the variance, blurred along the rows
  const Plane<double> powers(height, width), noises(height, width);
  struct Rows {
    Scratch<double> given, power, noise;
    explicit Rows(int64_t w) : given(w + 2 * blur_radius), power(w), noise(w) {
      for (int64_t i = 0; i < w + 2 * blur_radius; ++i) given[i] = 0;
    }
  };
  const PerThread<Rows> rows(threads, width);
#pragma omp parallel num_threads(threads)
  for (int64_t image = 0; image < raw.count; ++image) {
    Rows& mine = rows.mine();
    const T* from = static_cast<const T*>(raw.data) + image * raw.channels * plane;
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) {
      double* given = mine.given + blur_radius;
      for (int64_t x = 0; x < width; ++x) given[x] = power_of(from + y * width + x, plane, raw.channels);
      blur_row<double>(given, 1, weights, powers.row(y), width);
      for (int64_t x = 0; x < width; ++x) given[x] = variance[image * plane + y * width + x];
      blur_row<double>(given, 1, weights, noises.row(y), width);
    }
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) {
      blur_row<double>(powers.row(y), powers.stride, weights, mine.power, width);
      blur_row<double>(noises.row(y), noises.stride, weights, mine.noise, width);
      for (int64_t x = 0; x < width; ++x) mine.power[x] = shrinking_factor(mine.power[x], mine.noise[x]);
      for (int64_t c = 0; c < raw.channels; ++c) {
        const T* channel = from + c * plane + y * width;
        T* to = shrunk + (image * raw.channels + c) * plane + y * width;
        for (int64_t x = 0; x < width; ++x) to[x] = mul(channel[x], static_cast<T>(mine.power[x]));
      }
    }
  }
}

}  // namespace

void shrink(const Images& raw, const double* variance, void* shrunk, int threads) {
  if (raw.dtype == Dtype::float64) return run(raw, variance, static_cast<double*>(shrunk), threads);
  run(raw, variance, static_cast<float*>(shrunk), threads);
}

}  // namespace dave::DAVE_ISA
