// C = A·B on words, from registers: the matrix products inside of attention and linear.
//
//     C[i, j] (+)= Σ_k A[i·a_row + k·a_step] · B[k·ldb + j]        a float's word: one product; of bfloat16: two; of bytes: four
//
// A tile of up to 6 rows × 4 vectors of C stays in registers; A is broadcast word by word, B is read by vectors.
#pragma once

#include <type_traits>

#include "simd.h"

namespace dave::DAVE_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tile_rows = 6, tile_vectors = 4;
#else
constexpr int tile_rows = 4, tile_vectors = 3;
#endif

// Whether bfloat16 and bytes are multiplied by instructions of their own: elsewhere they take longer.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool multiplies_bfloat16 = true;
#else
constexpr bool multiplies_bfloat16 = false;
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool multiplies_bytes = true;
#else
constexpr bool multiplies_bytes = false;
#endif
// What is flipped of A's bytes: the top bits, where they are multiplied as signed ones, 128 less each. Sums then start at
// zero.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr uint32_t flipped = 0x80808080u;
#else
constexpr uint32_t flipped = 0;
#endif

template <typename T>
using Sum = std::conditional_t<sizeof(T) == 1, vint, vfloat>;

// total + the products of a word of A and words of B: of a float, of two bfloat16, or of four bytes, unsigned ones of A
// and signed ones of B
template <typename T>
DAVE_HD Sum<T> multiply_add(Sum<T> total, uint32_t a, vword b) {
  if constexpr (sizeof(T) == 4) {
    return fused(splat(number_of(a)), as_float(b), total);
  } else if constexpr (sizeof(T) == 2) {
#if defined(__AVX512BF16__)
    return (vfloat)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    // sums are rounded to odd, which has no bias: 1.2 to 1.3 times the error of fused products, a ten-thousandth of what
    // storing the result as bfloat16 costs; numbers below 2⁻¹²⁶ count as zero, as in AVX-512's instruction
    return (vfloat)vbfdotq_f32((float32x4_t)total, (bfloat16x8_t)b, (bfloat16x8_t)(vword{} + a));
#else
    // the order of AVX-512's instruction, which fuses both products
    total = fused(splat(number_of(a & 0xFFFF0000u)), as_float(b & 0xFFFF0000u), total);
    return fused(splat(number_of(a << 16)), as_float(b << 16), total);
#endif
  } else {
#if defined(__AVX512VNNI__)
    return (vint)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi32(static_cast<int>(a)), (__m512i)b);
#elif defined(__AVXVNNI__)
    return (vint)_mm256_dpbusd_avx_epi32((__m256i)total, _mm256_set1_epi32(static_cast<int>(a)), (__m256i)b);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (vint)vusdotq_s32((int32x4_t)total, (uint8x16_t)(vword{} + a), (int8x16_t)b);
#elif defined(__ARM_FEATURE_DOTPROD)
    return (vint)vdotq_s32((int32x4_t)total, (int8x16_t)(vword{} + (a ^ flipped)), (int8x16_t)b);
#else
    for (int byte = 0; byte < 4; ++byte) {
      const vint signed_byte = (vint)(b << (24 - 8 * byte)) >> 24;
      total += signed_byte * static_cast<int32_t>(a >> 8 * byte & 0xFF);
    }
    return total;
#endif
  }
}

template <int n>
struct Number {
  static constexpr int value = n;
};

#if defined(__aarch64__)
// Whether an instruction multiplies by one word of a vector: such a word needs no instruction to be broadcast.
template <typename T>
constexpr bool by_element = sizeof(T) == 4 || (sizeof(T) == 2 ? multiplies_bfloat16 : multiplies_bytes);

// multiply_add of a word of a vector
template <typename T, int word>
DAVE_HD Sum<T> multiply_add(Sum<T> total, vword a, vword b) {
  if constexpr (sizeof(T) == 4)
    return (vfloat)vfmaq_laneq_f32((float32x4_t)total, (float32x4_t)b, (float32x4_t)a, word);
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  else if constexpr (sizeof(T) == 2)
    return (vfloat)vbfdotq_laneq_f32((float32x4_t)total, (bfloat16x8_t)b, (bfloat16x8_t)a, word);
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
  else return (vint)vsudotq_laneq_s32((int32x4_t)total, (int8x16_t)b, (uint8x16_t)a, word);
#elif defined(__ARM_FEATURE_DOTPROD)
  else return (vint)vdotq_laneq_s32((int32x4_t)total, (int8x16_t)b, (int8x16_t)a, word);
#endif
}

// One step of a tile by words of vectors.
template <typename T, int word, int rows, int vectors>
DAVE_HD void step(Sum<T> (&total)[rows][vectors], const vword (&a)[rows], const uint32_t* b) {
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) {
    const auto column = load_raw<vword>(b + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) total[i][j] = multiply_add<T, word>(total[i][j], a[i], column);
  }
}
#endif

// Adds the products of all steps to a tile.
template <typename T, int rows, int vectors>
DAVE_HD void add_products(Sum<T> (&total)[rows][vectors], const uint32_t* a, int64_t a_row, int64_t a_step,
                          const uint32_t* b, int64_t ldb, int64_t steps) {
  int64_t k = 0;
#if defined(__aarch64__)
  if constexpr (by_element<T>)
    for (; a_step == 1 && k + 4 <= steps; k += 4) {
      vword words[rows];
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        words[i] = load_raw<vword>(a + i * a_row + k);
        if constexpr (sizeof(T) == 1) words[i] ^= flipped;
        // GCC would load each word by itself, and broadcast it
        asm("" : "+w"(words[i]));
      }
      step<T, 0>(total, words, b + k * ldb);
      step<T, 1>(total, words, b + (k + 1) * ldb);
      step<T, 2>(total, words, b + (k + 2) * ldb);
      step<T, 3>(total, words, b + (k + 3) * ldb);
    }
#endif
  for (; k < steps; ++k) {
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
}

template <typename T, int rows, int vectors>
void tile(const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
          int64_t steps, bool add_to) {
  vfloat total[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) total[i][j] = vfloat{};
  add_products<T>(total, a, a_row, a_step, b, ldb, steps);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * ldc + j * lanes;
      // added only here: the error of a long sum grows with the magnitude of its start
      store(to, add_to ? load(to) + total[i][j] : total[i][j]);
    }
}

// Calls f with a constant number of rows, from 1 to tile_rows.
template <typename F>
void with_rows(int rows, const F& f) {
  switch (rows) {
    case 1: return f(Number<1>{});
    case 2: return f(Number<2>{});
    case 3: return f(Number<3>{});
    case 4: return f(Number<4>{});
    case 5: return f(Number<5>{});
    default: return f(Number<tile_rows>{});
  }
}

template <typename T, int vectors>
void tile_of(int rows, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t ldb, float* c,
             int64_t ldc, int64_t steps, bool add_to) {
  with_rows(rows, [&](auto r) {
    tile<T, r.value, vectors>(a, a_row, a_step, b, ldb, c, ldc, steps, add_to);
  });
}

// A tile of bytes: C[i, j] (+)= scales[i·scale_row]·(starts[j] + Σ_k A[i, k]·B[k, j]), each sum of four products in int32.
// B, starts and C have rows of `vectors` vectors.
template <int rows, int vectors>
void byte_tile(const uint32_t* a, int64_t a_row, const float* scales, int64_t scale_row, const uint32_t* b,
               const int32_t* starts, float* c, int64_t steps, bool add_to) {
  constexpr int64_t width = vectors * lanes;
  vint total[rows][vectors];
#pragma GCC unroll 8
  for (int j = 0; j < vectors; ++j) {
    const vint start = flipped ? vint{} : load_raw<vint>(starts + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) total[i][j] = start;
  }
  add_products<uint8_t>(total, a, a_row, 1, b, width, steps);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const vfloat scale = splat(scales[i * scale_row]);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * width + j * lanes;
      const vfloat sum = __builtin_convertvector(total[i][j], vfloat);
      store(to, add_to ? fused_everywhere(sum, scale, load(to)) : sum * scale);
    }
  }
}

template <int vectors>
void byte_tile_of(int rows, const uint32_t* a, int64_t a_row, const float* scales, int64_t scale_row, const uint32_t* b,
                  const int32_t* starts, float* c, int64_t steps, bool add_to) {
  with_rows(rows, [&](auto r) {
    byte_tile<r.value, vectors>(a, a_row, scales, scale_row, b, starts, c, steps, add_to);
  });
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
