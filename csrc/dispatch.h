// The kernels of the instruction set in use: the best that this machine has, unless another was chosen.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dave {

// What an instruction set runs: its linear, and the other ops of it or of the one below it.
struct Build {
  const char* isa;
  const Kernels* kernels;
  const Products* products;
};

// Those that this machine can run, best first.
const std::vector<Build>& usable();

const Kernels& kernels();
const Products& products();
const char* isa();

// Takes one of the usable builds by name; false where there is none.
bool use_isa(const std::string& name);

}  // namespace dave
