// Host driver of linear: a task is a block of rows, and where rows are few, part of the panels.
#include "linear.h"

#include "gates.h"
#include "host.h"
#include "ops.h"
#include "tiles.h"

namespace dave::DAVE_ISA {
namespace {

constexpr int64_t panel = tile_vectors * lanes;
// in-features that are summed at once: a panel of them fits the first-level cache
constexpr int64_t longest_sum = 256;
// rows and panels of a block: their sums and the rows' operand fit the second-level cache
constexpr int64_t longest_block = 128, panels_together = 16;

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// In-features of a partial sum: nearly the same number in each.
int64_t sum_length(int64_t in) { return over(in, over(in, longest_sum)); }

struct Product {
  const float* x;
  int64_t rows, stride, in;
  const float* weights;
  int64_t out;
  const Epilogue& epilogue;
  float* y;
  int64_t panels = over(out, panel), length = sum_length(in);
};

// The number of parts that the rows are split into, a divisor of the threads; the panels are split for the rest. It
// leaves a thread at least eight tiles, since every thread that shares a block of rows packs it.
int64_t shares_of(int64_t rows, int threads) {
  int64_t shares = threads;
  while (shares > 1 && (threads % shares || rows < 8 * tile_rows * shares)) --shares;
  return shares;
}

// Rows [first, first + count) of a product, at most `height`.
struct Block {
  const Product& m;
  const int64_t height;
  // x in tiles of rows, for each sum (tile, in-feature, row of the tile); and what a last, narrower panel has summed
  Scratch<float> operand{height * m.in}, narrow{height * panel};
  int64_t first = 0, count = 0;

  Block(const Product& m_, int64_t height_) : m(m_), height(height_) {}

  void lay_out(int64_t first_, int64_t count_) {
    first = first_, count = count_;
    for (int64_t start = 0; start < m.in; start += m.length) {
      const int64_t size = lesser(m.length, m.in - start);
      for (int64_t i = 0; i < count; i += tile_rows) {
        const float* from = m.x + (first + i) * m.stride + start;
        float* to = operand + start * height + i * size;
        if (i + tile_rows <= count)
          interleave<tile_rows>(from, size, to);
        else
          for (int64_t last = 0; last < count - i; ++last) interleave<1>(from + last * m.stride, size, to + last);
      }
    }
  }

  // (rows, size) -> (size, tile_rows)
  template <int rows>
  void interleave(const float* from, int64_t size, float* to) const {
    for (int64_t k = 0; k < size; ++k)
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) to[k * tile_rows + i] = from[i * m.stride + k];
  }

  void multiply_panel(int64_t p, int64_t start) {
    const int64_t size = lesser(m.length, m.in - start);
    const bool whole = (p + 1) * panel <= m.out;
    float* c = whole ? m.y + first * m.out + p * panel : narrow;
    const int64_t ldc = whole ? m.out : panel;
    const auto* weights = reinterpret_cast<const uint32_t*>(m.weights + (start * m.panels + p * size) * panel);
    const auto* rows = reinterpret_cast<const uint32_t*>(operand + start * height);
    for (int64_t i = 0; i < count; i += tile_rows)
      tile_of<float, tile_vectors>(static_cast<int>(lesser(tile_rows, count - i)), rows + i * size, 1, tile_rows,
                                   weights, panel, c + i * ldc, ldc, size, start > 0);
  }

  // Sums c of n columns of a row -> y.
  template <int activation>
  void finish_row(const float* c, int64_t row, int64_t column, int64_t n) {
    const Epilogue& e = m.epilogue;
    const int64_t at = row * m.out + column;
    const vfloat scale = splat(e.row_scale ? e.row_scale[row] : 1.0f);
    for (int64_t j = 0; j < n; j += lanes) {
      vfloat y = load(c + j) * scale;
      if (e.bias) y += load_part(e.bias + column + j, n - j);
      if constexpr (activation >= 0) {
        const vfloat gate = gate_of<static_cast<Activation>(activation)>(y);
        store_part(e.new_gate + at + j, gate, n - j);
        y *= gate;
      } else {
        if (e.gate) y *= load_part(e.gate + at + j, n - j);
        if (e.residual) y += load_part(e.residual + at + j, n - j);
      }
      store_part(m.y + at + j, y, n - j);
    }
  }

  template <int activation>
  void finish(int64_t from, int64_t to) {
    const int64_t column = from * panel, end = lesser(to * panel, m.out), whole = end / panel * panel;
    for (int64_t i = 0; i < count; ++i) {
      finish_row<activation>(m.y + (first + i) * m.out + column, first + i, column, whole - column);
      finish_row<activation>(narrow + i * panel, first + i, whole, end - whole);
    }
  }

  void multiply(int64_t from, int64_t to) {
    for (int64_t start = 0; start < m.in; start += m.length)
      for (int64_t p = from; p < to; ++p) multiply_panel(p, start);
    if (m.epilogue.activation < 0) return finish<-1>(from, to);
    with_activation(static_cast<Activation>(m.epilogue.activation),
                    [&](auto a) { finish<static_cast<int>(a.value)>(from, to); });
  }
};

}  // namespace

// AVX-512 has not been compared with oneDNN's packed products; narrower vectors lose to them.
const int64_t linear_panel = lanes == 8 ? panel : 0;

void pack_linear(const float* matrix, int64_t out, int64_t in, float* weights) {
  const int64_t panels = over(out, panel), length = sum_length(in);
  for (int64_t start = 0; start < in; start += length) {
    const int64_t size = lesser(length, in - start);
    for (int64_t column = 0; column < panels * panel; ++column)
      for (int64_t k = 0; k < size; ++k)
        weights[(start * panels + column / panel * size + k) * panel + column % panel] =
            column < out ? matrix[column * in + start + k] : 0.0f;
  }
}

void linear(const float* x, int64_t rows, int64_t stride, int64_t in, const float* weights, int64_t out,
            const Epilogue& epilogue, float* y, int threads) {
  if (!rows) return;
  const Product m{x, rows, stride, in, weights, out, epilogue, y};
  const int64_t shares = shares_of(rows, threads), groups = lesser(threads / shares, m.panels);
  const int64_t blocks = over(over(rows, longest_block), shares) * shares, width = over(m.panels, groups);
  const int64_t height = over(over(rows, blocks), tile_rows) * tile_rows;
  PerThread<Block>(threads, m, height).run_unequal(blocks * groups, [&](Block& block, int64_t task) {
    const int64_t first = task / groups * height, group = task % groups, end = lesser((group + 1) * width, m.panels);
    if (first >= rows) return;
    block.lay_out(first, lesser(height, rows - first));
    for (int64_t p = group * width; p < end; p += panels_together) block.multiply(p, lesser(p + panels_together, end));
  });
}

}  // namespace dave::DAVE_ISA
