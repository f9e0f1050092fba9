// The entry points of one instruction set's build; table.cpp collects them.
#pragma once

#include "kernels.h"

namespace dave::DAVE_ISA {

void perturb(const Images& images, const Draws& draws, Patch patch, void* tokens, Dtype stored, int threads);
void normal(const int64_t* keys, const int64_t* samples, int64_t rows, int64_t elements, float* deviates, int threads);
void pull_back(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
               void* contributions, Dtype stored, int threads);
void robust_mean(const void* contributions, Dtype given, int64_t images, int64_t samples, int64_t pixels, void* raw,
                 int threads);
void smooth(const Images& raw, void* maps, int threads);

extern const Kernels kernels;

}  // namespace dave::DAVE_ISA
