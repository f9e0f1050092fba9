// linear on the host, in float32:  y = row_scale ⊙ (x Wᵀ) + bias, an activation or a gate, and a residual, in one pass.
//
//     T rows (tokens) · I in-features · O out-features
//
// W lies in panels: blocks of at most 256 in-features, and in each the out-features `panel` at a time, (I, panel), the
// last panel filled with zeros. A panel of a block stays in the first-level cache while the rows of x go by, four at a
// time; each block is summed in registers and then added, so that long sums lose no digits. A row's bits depend
// neither on the other rows nor on the threads.
#pragma once

#include <cstdint>

namespace dave {

// (T, O) contiguous but bias (O) and row_scale (T); null where there is none. With an activation its gate is written, and
// there is neither a gate nor a residual.
struct Epilogue {
  const float *bias, *row_scale, *gate, *residual;
  // of Activation, or -1
  int activation;
  float* new_gate;
};

}  // namespace dave
