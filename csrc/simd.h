// Vectors of `lanes` floats for the walks' kernels, in the compiler's own vector types: one source for every
// instruction set. Unlike the pixel ops these may fuse a multiplication and an addition.
#pragma once

#include <cstring>

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

DAVE_HD vfloat as_float(vword a) { return (vfloat)a; }
// an addition of integers, since the compiler cannot remove 0 + a of floats, which changes a = -0
DAVE_HD vfloat splat(float a) { return as_float(vword{} + bits_of(a)); }
DAVE_HD vword as_word(vfloat a) { return (vword)a; }
// The second where either is NaN: a NaN that must be propagated is passed second.
DAVE_HD vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

template <typename V, typename T>
DAVE_HD V load_raw(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

DAVE_HD vfloat load(const float* from) { return load_raw<vfloat>(from); }
DAVE_HD vword widen_words(const bfloat16* from) {
  return __builtin_convertvector(load_raw<vhalf>(from), vword);
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
  const vhalf half = __builtin_convertvector(rounded_words(a) >> 16, vhalf);
  __builtin_memcpy(to, &half, sizeof half);
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

DAVE_HD float sum_of(vfloat a) {
  float total = 0;
  for (int i = 0; i < lanes; ++i) total += a[i];
  return total;
}

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
  const vfloat rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vfloat p = splat(0.00137514111f);
  p = p * rest + 0.0083689381f;
  p = p * rest + 0.0416695354f;
  p = p * rest + 0.166665183f;
  p = p * rest + 0.499999886f;
  p = p * (rest * rest) + rest + 1.0f;
  const vword power = (as_word(shifted) - 0x4B400000u + 127u) << 23;
  const vfloat value = p * as_float(power);
  return a < splat(-87.0f) ? vfloat{} : value;
}

}  // namespace dave::DAVE_ISA
