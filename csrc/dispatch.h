// The choice of the kernels' build: the best instruction set of this machine, or one named.
#pragma once

#include "kernels.h"

namespace dave {

// The chosen build.
const Kernels& kernels();

// Name number i of the builds that this machine can run, best first; nullptr past the end.
const char* usable_isa(int i);

// Chooses the build of that name; false where this machine cannot run it.
bool use_isa(const char* name);

}  // namespace dave
