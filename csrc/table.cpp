// The table of one instruction set's kernels.
#include "ops.h"
#include "tiles.h"

#define DAVE_NAME_OF(isa) #isa
#define DAVE_NAME(isa) DAVE_NAME_OF(isa)

namespace dave::DAVE_ISA {

const Kernels kernels{DAVE_NAME(DAVE_ISA), perturb,    normal,   pull_back,           pull_back_mean, spread_mean,
                      robust_mean,         shrink,     smooth,   multiplies_bfloat16, attention,      attention_vjp,
                      row_rstd,            scale_rows, activate, linear_panel,        pack_linear,    linear};

}  // namespace dave::DAVE_ISA
