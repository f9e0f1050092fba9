// Host driver of linear: a task is a block of rows, and where rows are few, part of the panels.
#include "linear.h"

#include "gates.h"
#include "host.h"
#include "ops.h"
#include "tiles.h"

namespace dave::DAVE_ISA {
namespace {

constexpr int64_t panel = tile_vectors * lanes;
// words that are summed at once, and rows of a block, at most: both operands' fit the second-level cache
constexpr int64_t longest_sum = 384, longest_block = 96;
// words that share a scale in int8
constexpr int64_t group_words = scale_group / 4;
static_assert(longest_sum % group_words == 0);
// panels of a task
constexpr int64_t task_panels = 4;
// words behind a row of the operand, which keep the rows of a tile out of each other's sets of the cache
constexpr int64_t row_padding = 16;

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct Product {
  const Rows& x;
  const PackedShape shape;
  const uint32_t* weights;
  const Epilogue& epilogue;
  Matrix y;
  int64_t words = shape.words(), panels = shape.panels(), groups = shape.groups();
};

// The number of parts that the rows are split into, a divisor of the threads; the panels are split for the rest. It
// leaves a thread at least eight tiles, since every thread that shares a block of rows lays it out.
int64_t shares_of(int64_t rows, int threads) {
  int64_t shares = threads;
  while (shares > 1 && (threads % shares || rows < 8 * tile_rows * shares)) --shares;
  return shares;
}

vint magnitude_of(vfloat a) { return (vint)(as_word(a) & 0x7FFFFFFFu); }

// The scale of values whose largest magnitude has these bits, and its inverse. NaN and infinity make the scale NaN;
// what is below 2⁻¹⁰⁰ becomes zero, since its inverse would overflow.
void scale_of(int32_t largest, float& scale, float& inverse) {
  const float most = number_of(static_cast<uint32_t>(largest));
  scale = largest < 0x7F800000 ? most / 127.0f : number_of(0x7FC00000u);
  inverse = largest < 0x7F800000 && most >= 0x1p-100f ? 127.0f / most : 0.0f;
}

// The nearest integers, ties to even, of |a| < 2²², plus `more`.
vint rounded(vfloat a, int32_t more) {
  // adding 1.5·2²³ leaves the integer in the lowest bits
  return (vint)as_word(a + 12582912.0f) - (0x4B400000 - more);
}

// n values of x -> bytes q + 128; returns the scale. A last word is filled with zeros, 128.
template <typename T>
float quantise_group(const T* x, int64_t n, uint8_t* bytes) {
  const int64_t whole = n / lanes * lanes;
  vint most{};
  const auto compare = [&](vfloat values) {
    const vint size = magnitude_of(values);
    most = size > most ? size : most;
  };
  for (int64_t i = 0; i < whole; i += lanes) compare(load(x + i));
  if (whole < n) compare(load_part(x + whole, n - whole));
  int32_t largest = 0;
  for (int i = 0; i < lanes; ++i) largest = most[i] > largest ? most[i] : largest;
  float scale, inverse;
  scale_of(largest, scale, inverse);
  if (inverse == 0) {
    // NaN times zero is NaN
    std::memset(bytes, 128, over(n, 4) * 4);
    return scale;
  }
  const auto bytes_of = [&](vfloat values) { return low_bytes(rounded(values * inverse, 128)); };
  for (int64_t i = 0; i < whole; i += lanes) {
    const vbyte eight = bytes_of(load(x + i));
    std::memcpy(bytes + i, &eight, lanes);
  }
  if (whole < n) {
    const vbyte eight = bytes_of(load_part(x + whole, n - whole));
    std::memcpy(bytes + whole, &eight, over(n - whole, 4) * 4);
  }
  return scale;
}

// Rows of a product that one thread multiplies, at most `height`.
template <Operand kind>
struct Block {
  const Product& m;
  const int64_t height, stride;
  Scratch<uint32_t> operand{height * stride};
  // of groups (height, groups), in int8
  Scratch<float> scales{height * m.groups};
  // of a tile, where all in-features are summed at once; else of all tiles of a task
  Scratch<float> sums;
  int64_t first = 0, count = 0;
  // of the next weights: what is still to be brought into the second-level cache, and cache lines of it for each tile
  const uint32_t *next = nullptr, *next_end = nullptr;
  int64_t lines = 0;

  Block(const Product& m_, int64_t height_, int64_t width)
      : m(m_), height(height_), stride(m.words + row_padding),
        sums((m.words > longest_sum ? height * width : tile_rows) * panel) {}

  void lay_out(int64_t first_, int64_t count_) {
    // the thread's last task was of the same rows
    if (count && first == first_) return;
    first = first_, count = count_;
    with_float(m.x.dtype, [&](auto zero) {
      const auto* x = static_cast<const decltype(zero)*>(m.x.data);
      for (int64_t i = 0; i < count; ++i) lay_out_row(x + (first + i) * m.x.stride, operand + i * stride, i);
    });
  }

  template <typename T>
  void lay_out_row(const T* x, uint32_t* to, int64_t i) {
    const int64_t in = m.shape.in;
    if constexpr (kind == Operand::int8) {
      for (int64_t g = 0; g < m.groups; ++g)
        scales[i * m.groups + g] = quantise_group(x + g * scale_group, lesser(scale_group, in - g * scale_group),
                                                  reinterpret_cast<uint8_t*>(to + g * group_words));
    } else {
      // zero behind an odd number of values
      to[m.words - 1] = 0;
      using Value = std::conditional_t<kind == Operand::float32, float, bfloat16>;
      auto* values = reinterpret_cast<Value*>(to);
      for (int64_t k = 0; k < in; k += lanes) store_part(values + k, load_part(x + k, in - k), in - k);
    }
  }

  // All rows by panels [from, to)
  void multiply(int64_t from, int64_t to) {
    const int64_t blocks = over(m.words, longest_sum), length = whole_groups(over(m.words, blocks));
    for (int64_t k = 0; k < m.words; k += length)
      for (int64_t p = from; p < to; ++p) {
        const int64_t steps = lesser(length, m.words - k);
        fetch_weights(p + 1 < to ? p + 1 : from, p + 1 < to ? k : k + length, length);
        for (int64_t at = 0; at < count; at += tile_rows) {
          const int64_t rows = lesser(tile_rows, count - at);
          float* const to_sums = blocks > 1 ? sums + ((p - from) * height + at) * panel : sums;
          const bool last = k + steps == m.words;
          fetch_next();
          if (last) fetch_rows(first + at, rows, p * panel);
          sum(p, k, steps, at, static_cast<int>(rows), to_sums);
          if (last) finish(p, at, rows, to_sums);
        }
      }
  }

  static int64_t whole_groups(int64_t words) {
    return kind == Operand::int8 ? over(words, group_words) * group_words : words;
  }

  // Plans to bring the weights of a panel from word k on into the second-level cache, some before each tile.
  void fetch_weights(int64_t p, int64_t k, int64_t length) {
    const int64_t steps = k < m.words ? lesser(length, m.words - k) : 0;
    next = m.weights + p * m.shape.panel_words() + k * panel, next_end = next + steps * panel;
    lines = over(over(steps * panel, 16), over(count, tile_rows));
  }
  void fetch_next() {
    for (int64_t line = 0; line < lines && next < next_end; ++line, next += 16) __builtin_prefetch(next, 0, 2);
  }

  // Brings what the epilogue reads and writes of some rows and a panel into the cache while sums are made.
  void fetch_rows(int64_t row, int64_t rows, int64_t column) const {
    for (int64_t at = row * m.shape.out + column, end = at + rows * m.shape.out; at < end; at += m.shape.out) {
      fetch<true>(m.y, at), fetch<true>(m.epilogue.new_gate, at);
      fetch<false>(m.epilogue.gate, at), fetch<false>(m.epilogue.residual, at);
    }
  }
  template <bool to_write>
  static void fetch(const Matrix& matrix, int64_t at) {
    if (!matrix.data) return;
    const int64_t bytes = matrix.dtype == Dtype::bfloat16 ? 2 : 4;
    for (int64_t i = 0; i < panel * bytes; i += 64)
      __builtin_prefetch(static_cast<const char*>(matrix.data) + at * bytes + i, to_write, 3);
  }

  // Products of rows [i, i + rows) and words [k, k + steps) of a panel -> sums, or added to them
  void sum(int64_t p, int64_t k, int64_t steps, int64_t i, int rows, float* to) {
    const uint32_t* const weights = m.weights + p * m.shape.panel_words();
    const uint32_t* const x = operand + i * stride;
    if constexpr (kind == Operand::int8) {
      const auto* starts = reinterpret_cast<const int32_t*>(weights + m.words * panel);
      for (int64_t end = k + steps; k < end; k += group_words) {
        const int64_t g = k / group_words;
        byte_tile_of<tile_vectors>(rows, x + k, stride, scales + i * m.groups + g, m.groups, weights + k * panel,
                                   starts + g * panel, to, lesser(group_words, end - k), k > 0);
      }
    } else {
      using Value = std::conditional_t<kind == Operand::float32, float, bfloat16>;
      tile_of<Value, tile_vectors>(rows, x + k, stride, 1, weights + k * panel, panel, to, panel, steps, k > 0);
    }
  }

  // Sums of rows [i, i + rows) -> y
  void finish(int64_t p, int64_t i, int64_t rows, const float* from) {
    const int64_t column = p * panel, n = lesser(panel, m.shape.out - column);
    const auto* scale = reinterpret_cast<const float*>(m.weights + (p + 1) * m.shape.panel_words() - panel);
    const auto finish_rows = [&](auto activation) {
      for (int64_t at = 0; at < rows; ++at) {
        const float* const sum = from + at * panel;
        if (n == panel) finish_row<activation.value, true>(sum, scale, first + i + at, column, n);
        else finish_row<activation.value, false>(sum, scale, first + i + at, column, n);
      }
    };
    if (m.epilogue.activation < 0) return finish_rows(Number<-1>{});
    with_activation(static_cast<Activation>(m.epilogue.activation), [&](auto a) {
      finish_rows(Number<static_cast<int>(a.value)>{});
    });
  }

  template <int activation, bool whole>
  void finish_row(const float* sum, const float* scale, int64_t row, int64_t column, int64_t n) const {
    const Epilogue& e = m.epilogue;
    const int64_t at = row * m.shape.out + column;
    const vfloat factor = splat(e.row_scale ? e.row_scale[row] : 1.0f);
    vfloat y[tile_vectors], gate[tile_vectors];
#pragma GCC unroll 8
    for (int j = 0; j < tile_vectors; ++j) {
      y[j] = load(sum + j * lanes);
      if constexpr (kind == Operand::int8) y[j] *= load(scale + j * lanes);
      if (e.row_scale) y[j] *= factor;
    }
    if (e.bias) {
      load_row<whole>(e.bias + column, n, gate);
#pragma GCC unroll 8
      for (int j = 0; j < tile_vectors; ++j) y[j] += gate[j];
    }
    if constexpr (activation >= 0) {
#pragma GCC unroll 8
      for (int j = 0; j < tile_vectors; ++j) {
        gate[j] = gate_of<static_cast<Activation>(activation), kind != Operand::float32>(y[j]);
        y[j] *= gate[j];
      }
      store_row<whole>(e.new_gate, at, gate, n);
    } else {
      if (e.gate.data) {
        load_row<whole>(e.gate, at, n, gate);
#pragma GCC unroll 8
        for (int j = 0; j < tile_vectors; ++j) y[j] *= gate[j];
      }
      if (e.residual.data) {
        load_row<whole>(e.residual, at, n, gate);
#pragma GCC unroll 8
        for (int j = 0; j < tile_vectors; ++j) y[j] += gate[j];
      }
    }
    store_row<whole>(m.y, at, y, n);
  }

  // n values of a panel's row; all of them where it is whole, so that the loop is unrolled
  template <bool whole, typename T>
  static DAVE_HD void load_row(const T* from, int64_t n, vfloat* y) {
#pragma GCC unroll 8
    for (int j = 0; j < tile_vectors; ++j)
      y[j] = whole ? load(from + j * lanes) : j * lanes < n ? load_part(from + j * lanes, n - j * lanes) : vfloat{};
  }
  template <bool whole>
  static DAVE_HD void load_row(const Matrix& from, int64_t at, int64_t n, vfloat* y) {
    if (from.dtype == Dtype::bfloat16) return load_row<whole>(static_cast<const bfloat16*>(from.data) + at, n, y);
    load_row<whole>(static_cast<const float*>(from.data) + at, n, y);
  }
  template <bool whole, typename T>
  static DAVE_HD void store_row(T* to, const vfloat* y, int64_t n) {
#pragma GCC unroll 8
    for (int j = 0; j < tile_vectors; ++j)
      if (whole) store(to + j * lanes, y[j]);
      else if (j * lanes < n) store_part(to + j * lanes, y[j], n - j * lanes);
  }
  template <bool whole>
  static DAVE_HD void store_row(const Matrix& to, int64_t at, const vfloat* y, int64_t n) {
    if (to.dtype == Dtype::bfloat16) return store_row<whole>(static_cast<bfloat16*>(to.data) + at, y, n);
    store_row<whole>(static_cast<float*>(to.data) + at, y, n);
  }
};

template <Operand kind>
void run(const Product& m, int threads) {
  const int64_t rows = m.x.count, shares = shares_of(rows, threads);
  // blocks of the same number of tiles, or one fewer; tasks are short, so that no thread waits long for the last one
  const int64_t blocks = over(over(rows, longest_block), shares) * shares, tiles = over(rows, tile_rows);
  const int64_t groups = lesser(larger_of(threads / shares, over(m.panels, task_panels)), m.panels);
  const int64_t height = over(tiles, blocks) * tile_rows, width = over(m.panels, groups);
  PerThread<Block<kind>>(threads, m, height, width).run_unequal(blocks * groups, [&](Block<kind>& block, int64_t task) {
    const int64_t at = task / groups, group = task % groups;
    const int64_t first = at * tiles / blocks * tile_rows, end = lesser((at + 1) * tiles / blocks * tile_rows, rows);
    if (first >= end) return;
    block.lay_out(first, end - first);
    block.multiply(group * width, lesser((group + 1) * width, m.panels));
  });
}

template <Operand operand>
struct Kind {
  static constexpr Operand value = operand;
};

// Calls f with a constant operand.
template <typename F>
void with_operand(Operand operand, const F& f) {
  switch (operand) {
    case Operand::float32: return f(Kind<Operand::float32>{});
    case Operand::bfloat16: return f(Kind<Operand::bfloat16>{});
    case Operand::int8: return f(Kind<Operand::int8>{});
  }
}

// Writes a row of the matrix (in) as words, zero behind its end, and returns its scale in int8.
template <Operand kind>
float pack_row(const float* row, int64_t in, uint32_t* words, int64_t count) {
  std::memset(words, 0, count * sizeof *words);
  if constexpr (kind == Operand::int8) {
    int32_t largest = 0;
    for (int64_t k = 0; k < in; ++k) {
      const auto size = static_cast<int32_t>(bits_of(row[k]) & 0x7FFFFFFFu);
      largest = size > largest ? size : largest;
    }
    float scale, inverse;
    scale_of(largest, scale, inverse);
    auto* bytes = reinterpret_cast<int8_t*>(words);
    for (int64_t k = 0; k < in; ++k)
      bytes[k] = inverse == 0 ? 0 : static_cast<int8_t>(rounded(splat(row[k] * inverse), 0)[0]);
    return scale;
  } else {
    using Value = std::conditional_t<kind == Operand::float32, float, bfloat16>;
    for (int64_t k = 0; k < in; ++k) put(reinterpret_cast<Value*>(words)[k], row[k]);
    return 0;
  }
}

template <Operand kind>
void pack(const float* matrix, const PackedShape& shape, uint32_t* packed) {
  const int64_t words = shape.words(), groups = shape.groups();
  Scratch<uint32_t> row(words);
  for (int64_t column = 0; column < shape.panels() * panel; ++column) {
    uint32_t* const to = packed + column / panel * shape.panel_words() + column % panel;
    float scale = 0;
    if (column < shape.out) scale = pack_row<kind>(matrix + column * shape.in, shape.in, row, words);
    else std::memset(row, 0, words * sizeof *row);
    for (int64_t k = 0; k < words; ++k) to[k * panel] = row[k];
    if constexpr (kind == Operand::int8) {
      const auto* bytes = reinterpret_cast<const int8_t*>(static_cast<uint32_t*>(row));
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t k = g * scale_group; k < lesser((g + 1) * scale_group, 4 * words); ++k) sum += bytes[k];
        to[(words + g) * panel] = static_cast<uint32_t>(-128 * sum);
      }
      to[(words + groups) * panel] = bits_of(scale);
    }
  }
}

}  // namespace

const int64_t linear_panel = panel;

void pack_linear(const float* matrix, const PackedShape& shape, uint32_t* packed) {
  with_operand(shape.operand, [&](auto kind) { pack<kind.value>(matrix, shape, packed); });
}

void linear(const Rows& x, const PackedShape& shape, const uint32_t* weights, const Epilogue& epilogue, Matrix y,
            int threads) {
  if (!x.count) return;
  const Product m{x, shape, weights, epilogue, y};
  with_operand(shape.operand, [&](auto kind) { run<kind.value>(m, threads); });
}

}  // namespace dave::DAVE_ISA
