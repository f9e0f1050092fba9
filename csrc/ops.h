// The entry points of one instruction set's build; table.cpp collects them.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace dave::DAVE_ISA {

template <typename Pointer>
using Function = std::remove_pointer_t<Pointer>;

Function<decltype(Kernels::perturb)> perturb;
Function<decltype(Kernels::normal)> normal;
Function<decltype(Kernels::pull_back)> pull_back;
Function<decltype(Kernels::pull_back_mean)> pull_back_mean;
Function<decltype(Kernels::spread_mean)> spread_mean;
Function<decltype(Kernels::robust_mean)> robust_mean;
Function<decltype(Kernels::shrink)> shrink;
Function<decltype(Kernels::smooth)> smooth;
Function<decltype(Kernels::attention)> attention;
Function<decltype(Kernels::attention_vjp)> attention_vjp;
Function<decltype(Kernels::row_rstd)> row_rstd;
Function<decltype(Kernels::scale_rows)> scale_rows;
Function<decltype(Kernels::activate)> activate;
Function<decltype(Products::pack_linear)> pack_linear;
Function<decltype(Products::linear)> linear;

extern const int64_t linear_panel;
extern const Kernels kernels;
extern const Products products;

}  // namespace dave::DAVE_ISA
