// Vectors of `lanes` floats for the walks' kernels, in the compiler's own vector types: one source for every
// instruction set. A multiplication and an addition are fused only by `fused`, so that instruction sets that fuse agree
// on every bit.
#pragma once

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "numerics.h"

namespace dave::DAVE_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * lanes)));
typedef int32_t vint __attribute__((vector_size(4 * lanes)));
typedef uint32_t vword __attribute__((vector_size(4 * lanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * lanes)));
typedef uint8_t vbyte __attribute__((vector_size(lanes)));

DAVE_HD vfloat as_float(vword a) { return (vfloat)a; }
// an addition of integers, since the compiler cannot remove 0 + a of floats, which changes a = -0
DAVE_HD vfloat splat(float a) { return as_float(vword{} + bits_of(a)); }
DAVE_HD vword as_word(vfloat a) { return (vword)a; }

// a·b + c, rounded once where the instruction set can
DAVE_HD vfloat fused(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
DAVE_HD vfloat fused(vfloat a, vfloat b, float c) { return fused(a, b, splat(c)); }

// a·b + c, rounded once: where the instruction set cannot, by the C library, lane by lane
DAVE_HD vfloat fused_everywhere(vfloat a, vfloat b, vfloat c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fused(a, b, c);
#else
  for (int i = 0; i < lanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// The second where either is NaN: a NaN that must be propagated is passed second.
DAVE_HD vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
DAVE_HD vfloat smaller(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// Calls f with a zero of bfloat16 or float32.
template <typename F>
DAVE_HD void with_float(Dtype dtype, const F& f) {
  if (dtype == Dtype::bfloat16) return f(bfloat16{});
  f(float{});
}

template <typename V, typename T>
DAVE_HD V load_raw(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

DAVE_HD vfloat load(const float* from) { return load_raw<vfloat>(from); }
DAVE_HD vword widen_words(const bfloat16* from) {
#if defined(__AVX512F__)
  return (vword)_mm512_cvtepu16_epi32((__m256i)load_raw<vhalf>(from));
#elif defined(__aarch64__)
  // GCC converts vectors of eight bytes one value at a time
  return (vword)vmovl_u16(load_raw<uint16x4_t>(from));
#else
  return __builtin_convertvector(load_raw<vhalf>(from), vword);
#endif
}
DAVE_HD vfloat load(const bfloat16* from) { return as_float(widen_words(from) << 16); }

// Floats rounded to bfloat16, ties to even, in the upper half of each word.
DAVE_HD vword rounded_words(vfloat a) {
  const vword bits = as_word(a);
  // a NaN keeps its quiet bit, which rounding could carry away
  return (a != a) ? (bits | 0x00400000u) : (bits + 0x7FFFu + ((bits >> 16) & 1u));
}

DAVE_HD void store(float* to, vfloat a) { __builtin_memcpy(to, &a, sizeof a); }
DAVE_HD void store(bfloat16* to, vfloat a) {
#if defined(__AVX512BF16__)
  const auto half = _mm512_cvtneps_pbh((__m512)a);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  const auto half = vcvt_bf16_f32((float32x4_t)a);
#else
  const vhalf half = __builtin_convertvector(rounded_words(a) >> 16, vhalf);
#endif
  __builtin_memcpy(to, &half, sizeof half);
}

// The lowest byte of each integer.
DAVE_HD vbyte low_bytes(vint a) {
#if defined(__aarch64__)
  const auto halves = vmovn_u32((uint32x4_t)a);
  const auto bytes = vmovn_u16(vcombine_u16(halves, halves));
  return load_raw<vbyte>(&bytes);
#else
  return __builtin_convertvector(a, vbyte);
#endif
}

// One vector of a row of which n values are left; a shorter one goes through a buffer padded with zeros.
template <typename T>
DAVE_HD vfloat load_part(const T* from, int64_t n) {
  if (n >= lanes) return load(from);
  T part[lanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load(part);
}

template <typename T>
DAVE_HD void store_part(T* to, vfloat value, int64_t n) {
  if (n >= lanes) return store(to, value);
  T part[lanes];
  store(part, value);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

// A sum whose order does not depend on the width of vectors: value i of a row counts in part i mod 16, and the parts are
// added from the first to the last.
struct RowSum {
  static constexpr int vectors = 16 / lanes;
  vfloat parts[vectors] = {};

  // values [16 k + j·lanes, 16 k + (j + 1)·lanes) of the row
  DAVE_HD void add(int j, vfloat values) { parts[j] += values; }
  DAVE_HD float total(float total = 0) const {
    for (int j = 0; j < vectors; ++j)
      for (int i = 0; i < lanes; ++i) total += parts[j][i];
    return total;
  }
};

DAVE_HD float largest_of(vfloat a) {
  float largest = a[0];
  for (int i = 1; i < lanes; ++i) largest = a[i] > largest ? a[i] : largest;
  return largest;
}

// e^a for a ≤ 88, relative error below 2e-7; 0 below -87; NaN of NaN and of +∞.
DAVE_HD vfloat exponential(vfloat a) {
  const vfloat clamped = larger(splat(-87.0f), a);
  const vfloat scaled = clamped * 1.44269504f;
  // rounding to the nearest integer by the float format itself
  const vfloat shifted = scaled + 12582912.0f;
  const vfloat whole = shifted - 12582912.0f;
  // the remainder from the argument itself, ln 2 in two parts: scaled has lost the digits that matter
  const vfloat rest = fused(whole, splat(2.12194440e-4f), fused(whole, splat(-0.693359375f), clamped));
  vfloat p = splat(0.00137514111f);
  p = fused(p, rest, 0.0083689381f);
  p = fused(p, rest, 0.0416695354f);
  p = fused(p, rest, 0.166665183f);
  p = fused(p, rest, 0.499999886f);
  p = fused(p, rest * rest, rest) + 1.0f;
  const vword power = (as_word(shifted) - 0x4B400000u + 127u) << 23;
  const vfloat value = p * as_float(power);
  return a < splat(-87.0f) ? vfloat{} : value;
}

}  // namespace dave::DAVE_ISA
