// Arithmetic of all kernels, one rounding an operation, and the stored types.
//
// The same source is compiled for the host (once for each instruction set, each in a namespace of its own, so that
// the linker cannot mix them up) and for CUDA devices. On a device mul, add and sub are the intrinsics that the compiler
// may not fuse into an FMA; the host is compiled with -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DAVE_HD __host__ __device__ __forceinline__
#define DAVE_PRAGMA(text) _Pragma(#text)
#define DAVE_UNROLL DAVE_PRAGMA(unroll)
#define DAVE_UNROLL_BY(n) DAVE_PRAGMA(unroll n)
#else
#define DAVE_HD inline __attribute__((always_inline))
#define DAVE_UNROLL
#define DAVE_UNROLL_BY(n)
#endif

#ifndef DAVE_ISA
#define DAVE_ISA portable
#endif

namespace dave {

// The codes that Python passes for the types in memory.
enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

namespace DAVE_ISA {

#ifdef __CUDA_ARCH__
DAVE_HD float mul(float a, float b) { return __fmul_rn(a, b); }
DAVE_HD float add(float a, float b) { return __fadd_rn(a, b); }
DAVE_HD float sub(float a, float b) { return __fsub_rn(a, b); }
DAVE_HD float root(float a) { return __fsqrt_rn(a); }
DAVE_HD double mul(double a, double b) { return __dmul_rn(a, b); }
DAVE_HD double add(double a, double b) { return __dadd_rn(a, b); }
DAVE_HD double sub(double a, double b) { return __dsub_rn(a, b); }
// The result is unspecified where either is NaN.
DAVE_HD float smaller_of(float a, float b) { return fminf(a, b); }
DAVE_HD float larger_of(float a, float b) { return fmaxf(a, b); }
DAVE_HD double smaller_of(double a, double b) { return fmin(a, b); }
DAVE_HD double larger_of(double a, double b) { return fmax(a, b); }
#else
DAVE_HD float mul(float a, float b) { return a * b; }
DAVE_HD float add(float a, float b) { return a + b; }
DAVE_HD float sub(float a, float b) { return a - b; }
DAVE_HD float root(float a) { return __builtin_sqrtf(a); }
DAVE_HD double mul(double a, double b) { return a * b; }
DAVE_HD double add(double a, double b) { return a + b; }
DAVE_HD double sub(double a, double b) { return a - b; }
DAVE_HD float smaller_of(float a, float b) { return a < b ? a : b; }
DAVE_HD float larger_of(float a, float b) { return a > b ? a : b; }
DAVE_HD double smaller_of(double a, double b) { return a < b ? a : b; }
DAVE_HD double larger_of(double a, double b) { return a > b ? a : b; }
#endif

DAVE_HD float magnitude(float a) { return __builtin_fabsf(a); }
DAVE_HD double magnitude(double a) { return __builtin_fabs(a); }

template <typename To, typename From>
DAVE_HD To reread(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

DAVE_HD uint32_t bits_of(float value) { return reread<uint32_t>(value); }
DAVE_HD uint64_t bits_of(double value) { return reread<uint64_t>(value); }
DAVE_HD float number_of(uint32_t bits) { return reread<float>(bits); }
DAVE_HD double number_of(uint64_t bits) { return reread<double>(bits); }

// The unsigned integer as wide as T.
template <typename T>
using Bits = decltype(bits_of(T{}));

// value clamped to [low, high]; NaN becomes low, so that an index computed from it is valid.
template <typename T>
DAVE_HD T clamp(T value, T low, T high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

// Greatest integer ≤ value, for |value| < 2³¹.
template <typename T>
DAVE_HD int32_t floor_to_int(T value) {
  const int32_t truncated = static_cast<int32_t>(value);
  return truncated - (value < static_cast<T>(truncated) ? 1 : 0);
}

template <typename T>
DAVE_HD T horner(T x, const T* coefficients, int count) {
  T total = coefficients[count - 1];
  DAVE_UNROLL
  for (int k = count - 2; k >= 0; --k) total = add(mul(total, x), coefficients[k]);
  return total;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

DAVE_HD float widen(float value) { return value; }
DAVE_HD double widen(double value) { return value; }
DAVE_HD float widen(bfloat16 value) { return number_of(static_cast<uint32_t>(value.bits) << 16); }

DAVE_HD float widen(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7FFFu;
  // infinities and NaN keep their fraction; below 2⁻¹⁴ it counts in units of 2⁻²⁴
  if (rest >= 0x7C00u) return number_of(sign | 0x7F800000u | (rest << 13));
  if (rest < 0x0400u) return number_of(sign | bits_of(mul(static_cast<float>(rest), 0x1p-24f)));
  return number_of(sign | ((rest << 13) + 0x38000000u));
}

// Conversions to the stored dtype; bfloat16 and float16 round to nearest, ties to even, and keep NaN.
template <typename T>
DAVE_HD void put(float& to, T value) { to = static_cast<float>(value); }
template <typename T>
DAVE_HD void put(double& to, T value) { to = static_cast<double>(value); }
template <typename T>
DAVE_HD void put(bfloat16& to, T value) {
  const uint32_t bits = bits_of(static_cast<float>(value));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
template <typename T>
DAVE_HD void put(float16& to, T value) {
  const uint32_t bits = bits_of(static_cast<float>(value)), rest = bits & 0x7FFFFFFFu;
  uint32_t half;
  // from 2¹⁶ on infinity, or NaN; below 2⁻¹⁴ the addition of ½ rounds to units of 2⁻²⁴; else as for bfloat16
  if (rest >= 0x47800000u) half = rest > 0x7F800000u ? 0x7E00u : 0x7C00u;
  else if (rest < 0x38800000u) half = bits_of(add(number_of(rest), 0.5f)) - 0x3F000000u;
  else half = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
  to.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | half);
}

// Calls f with a zero of a dtype known at run time.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::float64: return f(double{});
    case Dtype::bfloat16: return f(bfloat16{});
    case Dtype::float16: return f(float16{});
  }
}

}  // namespace DAVE_ISA
}  // namespace dave
