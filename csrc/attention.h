// attention on the host:  P = softmax(scale·q kᵀ + bias), out = P v;  frozen VJP: dv = Pᵀ d_out.
// DAVE, arXiv 2602.06613, Eq. 3-5.
//
// P is made again as exp(s − peak)·share, from each query's largest score and 1/Σ exp(s − peak): its log-sum-exp in
// two parts, since one float of it would cost P digits.
//
// R rows · Q queries · N tokens · heads · D head dimension. A *word* is 32 bits: one float, or two bfloat16 that
// follow each other along the axis that is summed over, as the dot-product instruction takes them.
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
  // positive: what is past the last token has the score -∞
  float scale;
  // float32, or bfloat16 where `multiplies_bfloat16`
  Dtype dtype;
  // (heads, Q, N) of that type, contiguous, the same for all rows; null without a bias
  const void* bias = nullptr;
};

// (rows, heads, queries) each; null where they are not wanted
struct PeakAndShare {
  float *peak, *share;
};

// Words of one (row, head)'s saved P: float32 (Q, padded N), bfloat16 pairs of queries (⌈Q/2⌉, padded N).
struct SavedProbabilities {
  uint32_t* words;
  int64_t head;
};

// Tokens, rounded up to a whole number of the widest vectors, whatever the instruction set.
constexpr int64_t padded_tokens(int64_t tokens) { return (tokens + 15) / 16 * 16; }

}  // namespace dave
