// The tables of one instruction set's kernels.
#include "ops.h"
#include "tiles.h"

namespace dave::DAVE_ISA {

#ifndef DAVE_PRODUCTS_ALONE
const Kernels kernels{perturb, normal,              pull_back, pull_back_mean, spread_mean, robust_mean, shrink,
                      smooth,  multiplies_bfloat16, attention, attention_vjp,  row_rstd,    scale_rows,  activate};
#endif

const Products products{multiplies_bytes, linear_panel, pack_linear, linear};

}  // namespace dave::DAVE_ISA
