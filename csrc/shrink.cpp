// Host driver of shrink: one image after the other, one row a task.
#include "shrink.h"

#include "ops.h"
#include "planes.h"

namespace dave::DAVE_ISA {
namespace {

// The rows of one thread: one to blur, with a border of zeros, and one of each blurred plane.
struct Rows {
  Scratch<double> bordered, power, detail_power, noise;

  explicit Rows(int64_t width)
      : bordered(width + 2 * power_radius), power(width), detail_power(width), noise(width) {
    for (int64_t x = 0; x < width + 2 * power_radius; ++x) bordered[x] = 0;
  }
  double* given() const { return bordered + power_radius; }
};

// One image's planes.
struct Work {
  Scratch<double> sums, details, inside;
  Plane<double, mean_radius> across;
  Plane<double, power_radius> powers, detail_powers, noises;

  Work(int64_t height, int64_t width)
      : sums(height * width), details(height * width), inside(width), across(height, width), powers(height, width),
        detail_powers(height, width), noises(height, width) {}
};

template <typename T>
void run(const Images& raw, const double* variance, T* shrunk, int threads) {
  const int64_t height = raw.height, width = raw.width, plane = height * width;
  double mean[mean_taps], window[power_taps];
  gaussian_weights<mean_radius>(mean_sigma, mean);
  gaussian_weights<power_radius>(power_sigma, window);
  const Work work(height, width);
  for (int64_t x = 0; x < width; ++x) work.inside[x] = weight_inside(mean, x, width);
  const PerThread<Rows> rows(threads, width);
#pragma omp parallel num_threads(threads)
  for (int64_t image = 0; image < raw.count; ++image) {
    const Rows& mine = rows.mine();
    double* given = mine.given();
    const T* from = static_cast<const T*>(raw.data) + image * raw.channels * plane;
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) {
      double* sum = work.sums + y * width;
      for (int64_t x = 0; x < width; ++x) given[x] = sum[x] = channel_sum(from + y * width + x, plane, raw.channels);
      blur_row<mean_radius, double>(given, 1, mean, work.across.row(y), width);
    }
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) {
      const double *sum = work.sums + y * width, *spread = variance + image * plane + y * width;
      double* detail = work.details + y * width;
      const double inside = weight_inside(mean, y, height);
      blur_row<mean_radius, double>(work.across.row(y), work.across.stride, mean, detail, width);
      for (int64_t x = 0; x < width; ++x) detail[x] = sub(sum[x], detail[x] / mul(inside, work.inside[x]));
      for (int64_t x = 0; x < width; ++x) given[x] = mul(sum[x], sum[x]);
      blur_row<power_radius, double>(given, 1, window, work.powers.row(y), width);
      for (int64_t x = 0; x < width; ++x) given[x] = mul(detail[x], detail[x]);
      blur_row<power_radius, double>(given, 1, window, work.detail_powers.row(y), width);
      for (int64_t x = 0; x < width; ++x) given[x] = spread[x];
      blur_row<power_radius, double>(given, 1, window, work.noises.row(y), width);
    }
#pragma omp for schedule(static)
    for (int64_t y = 0; y < height; ++y) {
      const double *sum = work.sums + y * width, *detail = work.details + y * width;
      blur_row<power_radius, double>(work.powers.row(y), work.powers.stride, window, mine.power, width);
      blur_row<power_radius, double>(work.detail_powers.row(y), work.powers.stride, window, mine.detail_power, width);
      blur_row<power_radius, double>(work.noises.row(y), work.powers.stride, window, mine.noise, width);
      T* to = shrunk + image * plane + y * width;
      for (int64_t x = 0; x < width; ++x)
        to[x] = static_cast<T>(shrunk_sum(sum[x], detail[x], mine.power[x], mine.detail_power[x], mine.noise[x]));
    }
  }
}

}  // namespace

void shrink(const double* variance, const Images& raw, void* shrunk, int threads) {
  if (raw.dtype == Dtype::float64) return run(raw, variance, static_cast<double*>(shrunk), threads);
  run(raw, variance, static_cast<float*>(shrunk), threads);
}

}  // namespace dave::DAVE_ISA
