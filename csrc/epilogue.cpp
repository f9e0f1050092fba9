// Host drivers of linear's epilogues: rows shared by the threads, each row read once.
#include "epilogue.h"

#include "gates.h"
#include "host.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

template <typename T>
float rstd_of(const T* x, int64_t width, float eps, bool centred) {
  RowSum sum, squares;
  for (int64_t i = 0; i < width; i += 16)
    for (int j = 0; j < RowSum::vectors; ++j) {
      const vfloat v = load_part(x + i + j * lanes, width - i - j * lanes);
      sum.add(j, v);
      squares.add(j, v * v);
    }
  if (centred) return 1.0f / __builtin_sqrtf(squares.total() / width + eps);
  // a second pass about the mean: E[x²] − mean² would cancel
  const float mean = sum.total() / width;
  float variance = 0;
  RowSum about;
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int j = 0; j < RowSum::vectors; ++j) {
      const vfloat v = load(x + i + j * lanes) - mean;
      about.add(j, v * v);
    }
  for (; i < width; ++i) variance += (widen(x[i]) - mean) * (widen(x[i]) - mean);
  return 1.0f / __builtin_sqrtf(about.total(variance) / width + eps);
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

}  // namespace

void row_rstd(Values x, int64_t rows, int64_t width, float eps, bool centred, float* rstd, int threads) {
  with_float(x.dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(x.data);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) rstd[row] = rstd_of(from + row * width, width, eps, centred);
  });
}

void scale_rows(Values x, const float* scale, int64_t rows, int64_t width, void* y, int threads) {
  with_float(x.dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(x.data);
    auto* to = static_cast<decltype(zero)*>(y);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = row * width, end = i + width; i < end; i += lanes)
        store_part(to + i, load_part(from + i, end - i) * scale[row], end - i);
  });
}

void activate(Values u, Activation activation, Gated gated, int64_t rows, int64_t hidden, void* h, void* gate,
              int threads) {
  with_float(u.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_activation(activation, [&](auto a) {
      run_activate<T, a.value>(static_cast<const T*>(u.data), rows, hidden, gated, static_cast<T*>(h),
                               static_cast<T*>(gate), threads);
    });
  });
}

}  // namespace dave::DAVE_ISA
