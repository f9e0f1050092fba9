// Host drivers of linear's epilogues: rows shared by the threads, each row read once.
#include "epilogue.h"

#include "gates.h"
#include "host.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
float rstd_of(const T* x, int64_t width, float eps, bool centred) {
  vfloat sum{}, squares{};
  for (int64_t i = 0; i < width; i += lanes) {
    const vfloat v = load_part(x + i, width - i);
    sum += v;
    squares += v * v;
  }
  if (centred) return 1.0f / __builtin_sqrtf(sum_of(squares) / width + eps);
  // a second pass about the mean: E[x²] − mean² would cancel
  const float mean = sum_of(sum) / width;
  float variance = 0;
  vfloat about{};
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    const vfloat v = load(x + i) - mean;
    about += v * v;
  }
  for (; i < width; ++i) variance += (widen(x[i]) - mean) * (widen(x[i]) - mean);
  return 1.0f / __builtin_sqrtf((variance + sum_of(about)) / width + eps);
}

template <typename T>
void run_scale(const T* x, const float* scale, int64_t rows, int64_t width, T* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; i += lanes)
      store_part(y + row * width + i, load_part(x + row * width + i, width - i) * scale[row], width - i);
}

template <typename T, Activation activation>
void run_activate(const T* u, int64_t rows, int64_t hidden, Gated gated, T* h, T* gate, int threads) {
  const int64_t width = gated == Gated::no ? hidden : 2 * hidden;
  const int64_t value = gated == Gated::value_last ? hidden : 0, chosen = gated == Gated::value_first ? hidden : 0;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < hidden; i += lanes) {
      const int64_t n = hidden - i;
      const vfloat a = load_part(u + row * width + chosen + i, n);
      vfloat g = gate_of<activation>(a);
      if (gated != Gated::no) g *= a;
      const vfloat b = gated == Gated::no ? a : load_part(u + row * width + value + i, n);
      store_part(gate + row * hidden + i, g, n);
      store_part(h + row * hidden + i, g * b, n);
    }
}

template <typename T>
void activate_as(Activation activation, const T* u, int64_t rows, int64_t hidden, Gated gated, T* h, T* gate,
                 int threads) {
  switch (activation) {
    case Activation::gelu: return run_activate<T, Activation::gelu>(u, rows, hidden, gated, h, gate, threads);
    case Activation::gelu_tanh: return run_activate<T, Activation::gelu_tanh>(u, rows, hidden, gated, h, gate, threads);
    case Activation::silu: return run_activate<T, Activation::silu>(u, rows, hidden, gated, h, gate, threads);
    case Activation::relu: return run_activate<T, Activation::relu>(u, rows, hidden, gated, h, gate, threads);
    case Activation::quick_gelu:
      return run_activate<T, Activation::quick_gelu>(u, rows, hidden, gated, h, gate, threads);
  }
}

template <typename T>
void run_rstd(const T* x, int64_t rows, int64_t width, float eps, bool centred, float* rstd, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) rstd[row] = rstd_of(x + row * width, width, eps, centred);
}

}  // namespace

void row_rstd(const void* x, Dtype dtype, int64_t rows, int64_t width, float eps, bool centred, float* rstd,
              int threads) {
  if (dtype == Dtype::bfloat16)
    return run_rstd(static_cast<const bfloat16*>(x), rows, width, eps, centred, rstd, threads);
  run_rstd(static_cast<const float*>(x), rows, width, eps, centred, rstd, threads);
}

void scale_rows(const void* x, Dtype dtype, const float* scale, int64_t rows, int64_t width, void* y, int threads) {
  if (dtype == Dtype::bfloat16)
    return run_scale(static_cast<const bfloat16*>(x), scale, rows, width, static_cast<bfloat16*>(y), threads);
  run_scale(static_cast<const float*>(x), scale, rows, width, static_cast<float*>(y), threads);
}

void activate(const void* u, Dtype dtype, Activation activation, Gated gated, int64_t rows, int64_t hidden, void* h,
              void* gate, int threads) {
  if (dtype == Dtype::bfloat16)
    return activate_as(activation, static_cast<const bfloat16*>(u), rows, hidden, gated, static_cast<bfloat16*>(h),
                       static_cast<bfloat16*>(gate), threads);
  activate_as(activation, static_cast<const float*>(u), rows, hidden, gated, static_cast<float*>(h),
              static_cast<float*>(gate), threads);
}

}  // namespace dave::DAVE_ISA
