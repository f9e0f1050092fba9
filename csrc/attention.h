// attention on the host:  P = softmax(scale·q kᵀ + bias), out = P v;  frozen VJP: dv = Pᵀ d_out.
// DAVE, arXiv 2602.06613, Eq. 3-5.
//
// P is recomputed as exp(s − peak)·share, from each query's largest score and 1/Σ exp(s − peak): its log-sum-exp in
// two parts, since as a single float it would cost P digits.
//
// R rows · Q queries · N tokens · heads · D head_dim. A *word* is 32 bits: one float, or two bfloat16 that are neighbours
// along the axis that is summed over, as the dot-product instruction takes them.
#pragma once

#include <cstdint>

#include "numerics.h"

namespace dave {

// (rows, tokens, heads, D) in elements; D is contiguous
struct Heads {
  const void* data;
  int64_t row, token, head;
};

struct AttentionShape {
  int64_t rows, queries, tokens, heads, dim;
  // positive: the padding after the last token has the score -∞
  float scale;
  // float32 or bfloat16
  Dtype dtype;
  // (heads, Q, N) of that type, contiguous, the same for all rows; null without a bias
  const void* bias = nullptr;
};

// (rows, heads, queries) each, or null
struct PeakAndShare {
  float *peak, *share;
};

// Saved P of one (row, head) as words: float32 (Q, padded N), bfloat16 pairs of queries (⌈Q/2⌉, padded N).
struct SavedProbabilities {
  uint32_t* words;
  int64_t head;
};

// Tokens, rounded up to whole vectors of the widest instruction set.
constexpr int64_t padded_tokens(int64_t tokens) { return (tokens + 15) / 16 * 16; }

}  // namespace dave
