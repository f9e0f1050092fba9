// linear on the host:  y = row_scale ⊙ (x Wᵀ) + bias, an activation or a gate, and a residual, in one pass.
//
//     T rows (tokens) · I in-features · O out-features
//
// Operands are multiplied as words of 32 bits: a float, two bfloat16 or four bytes, summed in float32 or int32.
//
//     float32    W and x as they are
//     bfloat16   W and x rounded to bfloat16
//     int8       ŵ = s_o·q, q in [-127, 127], s_o = max|w|/127 of each out-feature's row; and
//                x̂ = s_tg·q, s_tg = max|x|/127 of each `group` of a row's in-features. Products are
//                Σ_g s_tg·Σ_{i in g} q_x q_w: integers inside of a group, float32 from group to group, so that a row has
//                the same bits whatever the instruction set. Bytes of x are q + 128, as VNNI multiplies u8 × s8; sums
//                start at −128·Σ q_w.
//
// W is packed in panels of `panel` out-features, the last one padded with zeros, each (words, panel); in int8 the starts
// of sums (groups, panel) and the scales (panel) follow. A block of rows of x is laid out once by the thread that
// multiplies it; then a few panels are taken at a time: some hundred in-features of all of them, then the next ones, so
// that both operands stay in the second-level cache; tiles of the last ones leave the epilogue while they are in the
// first-level cache. A row's bits depend neither on the other rows nor on the threads.
#pragma once

#include <cstdint>

#include "numerics.h"

namespace dave {

enum class Operand : int { float32 = 0, bfloat16 = 1, int8 = 2 };
constexpr int operands = 3;

// In-features that share a scale in int8.
constexpr int64_t scale_group = 384;

constexpr int64_t values_of_word(Operand operand) {
  return operand == Operand::float32 ? 1 : operand == Operand::bfloat16 ? 2 : 4;
}

// Sizes of packed weights.
struct PackedShape {
  Operand operand;
  int64_t out, in, panel;

  int64_t panels() const { return (out + panel - 1) / panel; }
  int64_t words() const { return (in + values_of_word(operand) - 1) / values_of_word(operand); }
  int64_t groups() const { return operand == Operand::int8 ? (in + scale_group - 1) / scale_group : 0; }
  // words of a panel: values, starts and scales
  int64_t panel_words() const { return panel * (words() + (operand == Operand::int8 ? groups() + 1 : 0)); }
};

// float32 or bfloat16 (rows, columns), contiguous; null where there is none
struct Matrix {
  void* data;
  Dtype dtype;
};

// Contiguous operands: bias (O), row_scale (T), the others (T, O); each may be null. With an activation its gate is
// written to new_gate, and gate and residual are null.
struct Epilogue {
  const float *bias, *row_scale;
  Matrix gate, residual;
  // of Activation, or -1
  int activation;
  Matrix new_gate;
};

// Rows of x, `stride` values from one to the next.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t count, stride;
};

}  // namespace dave
