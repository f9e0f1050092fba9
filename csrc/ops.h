// The entry points of one instruction set's build; table.cpp collects them.
#pragma once

#include "kernels.h"

namespace dave::DAVE_ISA {

void perturb(const Images& images, const Draws& draws, Patch patch, void* tokens, Dtype stored, int threads);
void normal(const int64_t* keys, const int64_t* samples, int64_t rows, int64_t elements, float* deviates, int threads);
void pull_back(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
               void* contributions, Dtype stored, int threads);
void pull_back_mean(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
                    int64_t samples, void* raw, int threads);
void robust_mean(const void* contributions, Dtype given, int64_t images, int64_t samples, int64_t pixels, void* raw,
                 int threads);
void smooth(const Images& raw, void* maps, int threads);

void attention(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v, void* out,
               PeakAndShare kept, SavedProbabilities saved, int threads);
void attention_vjp(const AttentionShape& shape, const Heads& q, const Heads& k, PeakAndShare kept,
                   SavedProbabilities saved, const Heads& d_out, void* d_v, int threads);
void row_rstd(const void* x, Dtype dtype, int64_t rows, int64_t width, float eps, bool centred, float* rstd,
              int threads);
void scale_rows(const void* x, Dtype dtype, const float* scale, int64_t rows, int64_t width, void* y, int threads);
void activate(const void* u, Dtype dtype, Activation activation, Gated gated, int64_t rows, int64_t hidden, void* h,
              void* gate, int threads);

void pack_linear(const float* matrix, int64_t out, int64_t in, float* weights);
void linear(const float* x, int64_t rows, int64_t stride, int64_t in, const float* weights, int64_t out,
            const Epilogue& epilogue, float* y, int threads);

extern const int64_t linear_panel;
extern const bool takes_bfloat16;
extern const Kernels kernels;

}  // namespace dave::DAVE_ISA
