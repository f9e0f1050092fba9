// The choice of the kernels' build: the best instruction set of this machine, or one named.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dave {

// The chosen build.
const Kernels& kernels();

// The builds that this machine can run, best first.
const std::vector<const Kernels*>& usable();

// Chooses the build of that name; false where this machine cannot run it.
bool use_isa(const std::string& name);

}  // namespace dave
