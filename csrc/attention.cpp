// Host driver of attention: one (row, head) a task, which packs its keys and values once and loops over blocks of queries.
#include "attention.h"

#include "host.h"
#include "ops.h"
#include "simd.h"
#include "tiles.h"

namespace dave::DAVE_ISA {
namespace {

// queries of a block: even, and few enough for their scores to stay in the second-level cache
constexpr int64_t query_block = 48;
// words of a score's dot product in a partial sum: a single sum over a wide head has twice plain PyTorch's error
constexpr int64_t depth_block = 32;

template <typename T>
const T* at(const Heads& heads, int64_t row, int64_t head) {
  return static_cast<const T*>(heads.data) + row * heads.row + head * heads.head;
}

template <typename T>
struct Task {
  // floats to a word
  static constexpr int64_t pair = sizeof(uint32_t) / sizeof(T);
  const AttentionShape& shape;
  const int64_t columns = padded_tokens(shape.tokens), depth = (shape.dim + pair - 1) / pair;
  const int64_t width = (shape.dim + 15) / 16 * 16;
  const int64_t longest = shape.queries > columns ? shape.queries : columns;
  Scratch<uint32_t> keys{depth * columns};
  Scratch<uint32_t> values{(longest / pair + 1) * width};
  Scratch<float> scores{query_block * columns};
  Scratch<uint32_t> rows{query_block * columns};
  Scratch<float> out{(columns > query_block ? columns : query_block) * width};

  explicit Task(const AttentionShape& shape_) : shape(shape_) {}

  // kᵀ: words (depth, columns), zero past the last token
  void pack_keys(const T* k, int64_t stride) {
    for (int64_t first = 0; first < columns; first += 16)
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t n = first; n < first + 16; ++n) {
          uint32_t word = 0;
          if (n < shape.tokens) std::memcpy(&word, k + n * stride + d * pair, sizeof word);
          keys[d * columns + n] = word;
        }
  }

  // (count, D) rows as words (⌈count/pair⌉, width): in bfloat16, two consecutive rows share a word
  void pack_rows(const T* from, int64_t stride, int64_t count) {
    for (int64_t n = 0; n < count; n += pair) {
      uint32_t* to = values + n / pair * width;
      const T* row = from + n * stride;
      const bool last = n + 1 == count;
      int64_t d = 0;
      for (; d + lanes <= shape.dim; d += lanes) {
        vword words = as_word(load(row + d));
        if constexpr (pair == 2) {
          words = widen_words(row + d);
          if (!last) words |= widen_words(row + stride + d) << 16;
        }
        std::memcpy(to + d, &words, sizeof words);
      }
      for (; d < width; ++d) {
        T both[pair] = {};
        for (int64_t i = 0; i < pair && !(last && i); ++i)
          if (d < shape.dim) both[i] = row[i * stride + d];
        std::memcpy(to + d, both, sizeof(uint32_t));
      }
    }
  }

  // scores of queries [first, first + count): (count, columns), divided by the scale, and so is the bias
  void score(const T* q, int64_t stride, int64_t head, int64_t first, int64_t count) {
    const auto* words = reinterpret_cast<const uint32_t*>(q + first * stride);
    for (int64_t d = 0; d < depth; d += depth_block) {
      const int64_t steps = depth - d < depth_block ? depth - d : depth_block;
      multiply<T>(words + d, stride / pair, 1, count, keys + d * columns, columns, columns, scores, columns, steps,
                  d > 0);
    }
    if (!shape.bias) return;
    const float over_scale = 1.0f / shape.scale;
    for (int64_t i = 0; i < count; ++i) {
      const T* bias = static_cast<const T*>(shape.bias) + (head * shape.queries + first + i) * shape.tokens;
      float* s = scores + i * columns;
      int64_t n = 0;
      for (; n + lanes <= shape.tokens; n += lanes) store(s + n, load(s + n) + load(bias + n) * over_scale);
      for (; n < shape.tokens; ++n) s[n] += widen(bias[n]) * over_scale;
    }
  }

  // Replaces one row of scores by exp(scale·s − its maximum), zero past the last token; returns the sum and the maximum.
  // The maximum ignores NaN, but the sum becomes NaN, as it does for +∞ and for a row of -∞, where ∞ − ∞ is NaN.
  float exponentials(float* s, float& peak) const {
    vfloat highest = splat(-INFINITY);
    for (int64_t n = shape.tokens; n < columns; ++n) s[n] = -INFINITY;
    for (int64_t n = 0; n < columns; n += lanes) highest = larger(load(s + n), highest);
    peak = largest_of(highest) * shape.scale;
    RowSum sum;
    for (int64_t n = 0; n < columns; n += 16)
      for (int j = 0; j < RowSum::vectors; ++j) {
        float* const at = s + n + j * lanes;
        const vfloat e = exponential(load(at) * shape.scale - peak);
        sum.add(j, e);
        store(at, e);
      }
    return sum.total();
  }

  // Replaces rows of scores by P, and stores the peak and share of each query.
  void softmax(int64_t count, PeakAndShare kept, int64_t first) {
    for (int64_t i = 0; i < count; ++i) {
      float* s = scores + i * columns;
      float peak;
      const float total = exponentials(s, peak);
      const float share = 1.0f / total;
      for (int64_t n = 0; n < columns; n += lanes) store(s + n, load(s + n) * share);
      if (!kept.peak) continue;
      kept.peak[first + i] = peak;
      kept.share[first + i] = share;
    }
  }

  // Replaces rows of scores by P, recomputed from each query's peak and share.
  void probabilities(int64_t count, PeakAndShare kept, int64_t first) {
    for (int64_t i = 0; i < count; ++i) {
      float* s = scores + i * columns;
      for (int64_t n = shape.tokens; n < columns; ++n) s[n] = -INFINITY;
      for (int64_t n = 0; n < columns; n += lanes)
        store(s + n, exponential(load(s + n) * shape.scale - kept.peak[first + i]) * kept.share[first + i]);
    }
  }

  // P's rows as words along the tokens, the left operand of P v
  const uint32_t* rows_of_words(int64_t count) {
    if constexpr (pair == 1) return reinterpret_cast<const uint32_t*>(static_cast<float*>(scores));
    for (int64_t i = 0; i < count; ++i) {
      auto* to = reinterpret_cast<bfloat16*>(rows + i * (columns / pair));
      for (int64_t n = 0; n < columns; n += lanes) store(to + n, load(scores + i * columns + n));
    }
    return rows;
  }

  // P as words along the queries, the left operand of Pᵀ d_out: (⌈count/pair⌉, columns)
  void save(int64_t count, uint32_t* to) const {
    for (int64_t i = 0; i < count; i += pair)
      for (int64_t n = 0; n < columns; n += lanes) {
        const vfloat first = load(scores + i * columns + n);
        vword words = as_word(first);
        if constexpr (pair == 2) {
          const vfloat second = i + 1 < count ? load(scores + (i + 1) * columns + n) : vfloat{};
          words = (rounded_words(first) >> 16) | (rounded_words(second) & 0xFFFF0000u);
        }
        std::memcpy(to + i / pair * columns + n, &words, sizeof words);
      }
  }

  void store_out(T* to, int64_t stride, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < shape.dim; ++d) put(to[i * stride + d], out[i * width + d]);
  }
};

template <typename T>
void run_forward(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v, void* out,
                 PeakAndShare kept, SavedProbabilities saved, int threads) {
  const int64_t stride = shape.heads * shape.dim;
  PerThread<Task<T>>(threads, shape).run_unequal(shape.rows * shape.heads, [&](Task<T>& task, int64_t index) {
    const int64_t row = index / shape.heads, head = index % shape.heads;
    task.pack_keys(at<T>(k, row, head), k.token);
    task.pack_rows(at<T>(v, row, head), v.token, shape.tokens);
    for (int64_t first = 0; first < shape.queries; first += query_block) {
      const int64_t count = first + query_block < shape.queries ? query_block : shape.queries - first;
      task.score(at<T>(q, row, head), q.token, head, first, count);
      task.softmax(count, kept, index * shape.queries + first);
      if (saved.words) task.save(count, saved.words + index * saved.head + first / task.pair * task.columns);
      multiply<T>(task.rows_of_words(count), task.columns / task.pair, 1, count, task.values, task.width, task.width,
                  task.out, task.width, (shape.tokens + task.pair - 1) / task.pair, false);
      T* to = static_cast<T*>(out) + (row * shape.queries + first) * stride + head * shape.dim;
      task.store_out(to, stride, count);
    }
  });
}

template <typename T>
void run_vjp(const AttentionShape& shape, const Heads& q, const Heads& k, PeakAndShare kept, SavedProbabilities saved,
             const Heads& d_out, void* d_v, int threads) {
  const int64_t stride = shape.heads * shape.dim, block = saved.words ? shape.queries : query_block;
  PerThread<Task<T>>(threads, shape).run_unequal(shape.rows * shape.heads, [&](Task<T>& task, int64_t index) {
    const int64_t row = index / shape.heads, head = index % shape.heads;
    if (!saved.words) task.pack_keys(at<T>(k, row, head), k.token);
    for (int64_t first = 0; first < shape.queries; first += block) {
      const int64_t count = first + block < shape.queries ? block : shape.queries - first;
      const uint32_t* words = saved.words + index * saved.head;
      if (!saved.words) {
        task.score(at<T>(q, row, head), q.token, head, first, count);
        task.probabilities(count, kept, index * shape.queries + first);
        task.save(count, task.rows);
        words = task.rows;
      }
      task.pack_rows(at<T>(d_out, row, head) + first * d_out.token, d_out.token, count);
      multiply<T>(words, 1, task.columns, shape.tokens, task.values, task.width, task.width, task.out, task.width,
                  (count + task.pair - 1) / task.pair, first > 0);
    }
    task.store_out(static_cast<T*>(d_v) + row * shape.tokens * stride + head * shape.dim, stride, shape.tokens);
  });
}

}  // namespace

void attention(const AttentionShape& shape, const Heads& q, const Heads& k, const Heads& v, void* out,
               PeakAndShare kept, SavedProbabilities saved, int threads) {
  if (shape.dtype == Dtype::bfloat16) return run_forward<bfloat16>(shape, q, k, v, out, kept, saved, threads);
  run_forward<float>(shape, q, k, v, out, kept, saved, threads);
}

void attention_vjp(const AttentionShape& shape, const Heads& q, const Heads& k, PeakAndShare kept,
                   SavedProbabilities saved, const Heads& d_out, void* d_v, int threads) {
  if (shape.dtype == Dtype::bfloat16) return run_vjp<bfloat16>(shape, q, k, kept, saved, d_out, d_v, threads);
  run_vjp<float>(shape, q, k, kept, saved, d_out, d_v, threads);
}

}  // namespace dave::DAVE_ISA
