// C = A·B on words, from registers: the matrix products inside of attention and linear.
//
//     C[i, j] (+)= Σ_k A[i·a_row + k·a_step] · B[k·ldb + j]        float words: one product; bfloat16 pairs: two
//
// A tile of up to 6 rows × 4 vectors of C stays in registers; A is broadcast word by word, B is read by vectors.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace dave::DAVE_ISA {

#if defined(__AVX512F__)
constexpr int tile_rows = 6, tile_vectors = 4;
#else
constexpr int tile_rows = 4, tile_vectors = 3;
#endif

#if defined(__AVX512BF16__)
constexpr bool multiplies_bfloat16 = true;
#else
constexpr bool multiplies_bfloat16 = false;
#endif

template <typename T>
DAVE_HD vfloat multiply_add(vfloat total, uint32_t a, vword b) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    return (vfloat)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#endif
  return total + splat(number_of(a)) * as_float(b);
}

template <typename T, int rows, int vectors>
void tile(const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
          int64_t steps, bool add_to) {
  vfloat total[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) total[i][j] = vfloat{};
  for (int64_t k = 0; k < steps; ++k) {
    vword column[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) column[j] = load_raw<vword>(b + k * ldb + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      // by memcpy, since linear's operand was written as floats
      const auto word = load_raw<uint32_t>(a + i * a_row + k * a_step);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) total[i][j] = multiply_add<T>(total[i][j], word, column[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * ldc + j * lanes;
      // added only here: the error of a long sum grows with the magnitude of its start
      store(to, add_to ? load(to) + total[i][j] : total[i][j]);
    }
}

template <typename T, int vectors>
void tile_of(int rows, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t ldb, float* c,
             int64_t ldc, int64_t steps, bool add_to) {
  switch (rows) {
    case 1: return tile<T, 1, vectors>(a, a_row, a_step, b, ldb, c, ldc, steps, add_to);
    case 2: return tile<T, 2, vectors>(a, a_row, a_step, b, ldb, c, ldc, steps, add_to);
    case 3: return tile<T, 3, vectors>(a, a_row, a_step, b, ldb, c, ldc, steps, add_to);
    case 4: return tile<T, 4, vectors>(a, a_row, a_step, b, ldb, c, ldc, steps, add_to);
    case 5: return tile<T, 5, vectors>(a, a_row, a_step, b, ldb, c, ldc, steps, add_to);
    default: return tile<T, 6, vectors>(a, a_row, a_step, b, ldb, c, ldc, steps, add_to);
  }
}

// C (m, columns) from A (m, steps) and B (steps, columns); columns is a multiple of 16.
template <typename T>
void multiply(const uint32_t* a, int64_t a_row, int64_t a_step, int64_t m, const uint32_t* b, int64_t ldb,
              int64_t columns, float* c, int64_t ldc, int64_t steps, bool add_to) {
  const int64_t vectors = columns / lanes, bands = (vectors + tile_vectors - 1) / tile_vectors;
  for (int64_t band = 0, first = 0; band < bands; ++band) {
    // bands of nearly equal width: a last band of a single vector would leave the multipliers idle
    const int64_t width = (vectors - first + bands - band - 1) / (bands - band);
    for (int64_t i = 0; i < m; i += tile_rows) {
      const int rows = static_cast<int>(m - i < tile_rows ? m - i : tile_rows);
      const uint32_t* a_tile = a + i * a_row;
      const uint32_t* b_tile = b + first * lanes;
      float* c_tile = c + i * ldc + first * lanes;
      switch (width) {
        case 1: tile_of<T, 1>(rows, a_tile, a_row, a_step, b_tile, ldb, c_tile, ldc, steps, add_to); break;
        case 2: tile_of<T, 2>(rows, a_tile, a_row, a_step, b_tile, ldb, c_tile, ldc, steps, add_to); break;
        case 3: tile_of<T, 3>(rows, a_tile, a_row, a_step, b_tile, ldb, c_tile, ldc, steps, add_to); break;
        default: tile_of<T, tile_vectors>(rows, a_tile, a_row, a_step, b_tile, ldb, c_tile, ldc, steps, add_to);
      }
    }
    first += width;
  }
}

}  // namespace dave::DAVE_ISA
