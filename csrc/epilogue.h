// Passes of linear around a library's GEMM on the host, and of the walks around linear:
//
//     row_rstd     r = 1/√(mean(x²) + eps), or with the variance for rows that have a mean
//     scale_rows   y = r ⊙ x
//     activate     gate = act(u)/u, h = gate·u; for a gated MLP gate = act(a), h = gate·b
#pragma once

#include <cstdint>

namespace dave {

enum class Activation : int { gelu = 0, gelu_tanh = 1, silu = 2, relu = 3, quick_gelu = 4 };
constexpr int activations = 5;

// The part of a row of u that is the value: all of it (no gated MLP), or its second or first half.
enum class Gated : int { no = 0, value_last = 1, value_first = 2 };

}  // namespace dave
