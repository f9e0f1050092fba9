// gate(u) = act(u)/u of the activations, on vectors.
#pragma once

#include "epilogue.h"
#include "simd.h"

namespace dave::DAVE_ISA {

// Φ(u), by our own least-squares fits: for |u| < 1.3, ½ + u·polynomial in u² (absolute error below 1e-10, and no
// digits lost); beyond, ½ erfc(|u|/√2) = ½·e^(−u²/2)·polynomial in 1/(1 + 0.4|u|/√2) (below 4e-10), or 1 minus it.
DAVE_HD vfloat normal_cdf(vfloat u) {
  const vfloat square = u * u;
  vfloat near = splat(4.52494174e-7f);
  near = fused(near, square, -8.94094402e-6f);
  near = fused(near, square, 1.14807471e-4f);
  near = fused(near, square, -1.18690384e-3f);
  near = fused(near, square, 9.97340854e-3f);
  near = fused(near, square, -6.64903571e-2f);
  near = fused(near, square, 0.398942279f);

  const vfloat size = larger(u, -u) * 0.707106781f;
  const vfloat t = 1.0f / (fused(size, splat(0.4f), 1.0f));
  vfloat p = splat(0.0785756605f);
  p = fused(p, t, -0.414404387f);
  p = fused(p, t, 0.722865199f);
  p = fused(p, t, -0.414216799f);
  p = fused(p, t, 0.433200921f);
  p = fused(p, t, 0.131139389f);
  p = fused(p, t, 0.238004496f);
  p = fused(p, t, 0.22483552f);
  const vfloat tail = exponential(square * -0.5f) * (p * t) * 0.5f;
  return square < 1.69f ? fused(near, u, 0.5f) : (u < 0.0f ? tail : 1.0f - tail);
}

// Φ(u) with an absolute error of 2.2e-5, a hundredth of bfloat16's near 1, in a third of the time: ½ + u·polynomial in u²
// on [-4, 4] (our own minimax fit), and its value at the ends beyond, where the error is 5.5e-5.
DAVE_HD vfloat coarse_normal_cdf(vfloat u) {
  u = larger(splat(-4.0f), smaller(splat(4.0f), u));
  const vfloat square = u * u;
  vfloat p = splat(-1.58078074e-9f);
  p = fused(p, square, 1.2171079e-7f);
  p = fused(p, square, -4.10085912e-6f);
  p = fused(p, square, 8.06673098e-5f);
  p = fused(p, square, -0.00104820386f);
  p = fused(p, square, 0.00966487236f);
  p = fused(p, square, -0.0661753759f);
  p = fused(p, square, 0.398847506f);
  return fused(p, u, 0.5f);
}

DAVE_HD vfloat sigmoid(vfloat u) {
  // the exponential of a negative number only: no overflow, and no cancellation in either tail
  const vfloat e = exponential(-larger(u, -u));
  return (u < 0.0f ? e : splat(1.0f)) / (e + 1.0f);
}

// coarse: whether the gate is rounded to bfloat16
template <Activation activation, bool coarse = false>
DAVE_HD vfloat gate_of(vfloat u) {
  if constexpr (activation == Activation::gelu && coarse) {
    return coarse_normal_cdf(u);
  } else if constexpr (activation == Activation::gelu) {
    return normal_cdf(u);
  } else if constexpr (activation == Activation::gelu_tanh) {
    // ½(1 + tanh z) = sigmoid(2z), z = √(2/π)·(u + 0.044715 u³)
    return sigmoid(fused(u * u, splat(0.044715f), 1.0f) * u * 1.59576912f);
  } else if constexpr (activation == Activation::silu) {
    return sigmoid(u);
  } else if constexpr (activation == Activation::quick_gelu) {
    return sigmoid(u * 1.702f);
  } else {
    static_assert(activation == Activation::relu, "this activation has no gate here");
    return u > 0.0f ? splat(1.0f) : vfloat{};
  }
}

template <Activation activation>
struct Chosen {
  static constexpr Activation value = activation;
};

// Calls f with the Chosen of an activation known at run time.
template <typename F>
void with_activation(Activation activation, const F& f) {
  static_assert(activations == 5, "every activation needs its case");
  switch (activation) {
    case Activation::gelu: return f(Chosen<Activation::gelu>{});
    case Activation::gelu_tanh: return f(Chosen<Activation::gelu_tanh>{});
    case Activation::silu: return f(Chosen<Activation::silu>{});
    case Activation::relu: return f(Chosen<Activation::relu>{});
    case Activation::quick_gelu: return f(Chosen<Activation::quick_gelu>{});
  }
}

}  // namespace dave::DAVE_ISA
