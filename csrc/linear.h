// linear on the host, in float32:  y = row_scale ⊙ (x Wᵀ) + bias, an activation or a gate, and a residual, in one pass.
//
//     T rows (tokens) · I in-features · O out-features
//
// W is stored in panels: blocks of at most 256 in-features, and in each the out-features `panel` at a time, (I, panel),
// the last panel padded with zeros. A panel of a block stays in the first-level cache during the loop over the rows of x,
// four at a time; each block is summed in registers and then added, so that long sums lose no digits. A row's bits depend
// neither on the other rows nor on the threads.
#pragma once

#include <cstdint>

namespace dave {

// Contiguous operands: bias (O), row_scale (T), the others (T, O); each may be null. With an activation its gate is
// written to new_gate, and gate and residual are null.
struct Epilogue {
  const float *bias, *row_scale, *gate, *residual;
  // of Activation, or -1
  int activation;
  float* new_gate;
};

}  // namespace dave
