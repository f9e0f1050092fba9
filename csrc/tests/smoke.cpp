// Runs every kernel on odd shapes with outputs of exactly the right size, for AddressSanitizer and UBSan to watch;
// checks that every output was written, and its value where that is simple.
#include <algorithm>
#include <cstring>

#include "cases.h"
#include "dispatch.h"

namespace {

template <typename T>
void require_finite(const std::vector<T>& v, const char* what) {
  for (T value : v) require(std::isfinite(value), what);
}

template <typename T>
void warps(dave::Dtype dtype, int64_t channels, int64_t height, int64_t width, dave::Patch patch, int threads) {
  const auto pixels = values<T>(2 * channels * height * width);
  const Rows rows;
  const dave::Inputs inputs{{pixels.data(), dtype, 2, channels, height, width}, rows.draws(), patch};
  const auto n = static_cast<size_t>(Rows::count * channels * height * width);
  std::vector<T> tokens(n, NAN), contributions(n, NAN);
  std::vector<uint16_t> stored(n, 0x7FC0);
  const auto& kernels = dave::kernels();
  kernels.perturb(inputs, {tokens.data(), dtype}, threads);
  require_finite(tokens, "perturb left something unwritten");
  kernels.perturb(inputs, {stored.data(), dave::Dtype::bfloat16}, threads);
  for (uint16_t word : stored) require((word & 0x7FFF) < 0x7F80, "perturb left a bfloat16 unwritten");
  kernels.pull_back({tokens.data(), dtype}, inputs, {contributions.data(), dtype}, threads);
  require_finite(contributions, "pull_back left something unwritten");
  const int64_t samples = Rows::samples_an_image;
  std::vector<T> raw(pixels.size(), NAN), of_contributions(pixels.size(), NAN);
  std::vector<double> variance(static_cast<size_t>(2 * height * width), NAN), of_samples = variance;
  kernels.pull_back_mean({tokens.data(), dtype}, inputs, samples, {raw.data(), nullptr}, threads);
  const dave::Contributions stack{{contributions.data(), dtype}, 2, samples, channels, height * width};
  kernels.robust_mean(stack, {of_contributions.data(), of_samples.data()}, threads);
  require(raw == of_contributions, "pull_back_mean is not robust_mean of pull_back");
  kernels.pull_back_mean({tokens.data(), dtype}, inputs, samples, {raw.data(), variance.data()}, threads);
  require(raw == of_contributions, "pull_back_mean depends on whether its variance is wanted");
  require_finite(variance, "pull_back_mean left a variance unwritten");
  require(variance == of_samples, "the variance of pull_back_mean is not that of robust_mean");
  // the last row lies outside of its source: no contribution at all
  for (size_t i = n / Rows::count * (Rows::count - 1); i < n; ++i)
    require(contributions[i] == 0, "a far-off warp contributes");
}

// A density a patch is pulled back like tokens that have it in every element, with images and signals of one.
template <typename T>
void spreads(dave::Dtype dtype, int64_t height, int64_t width, dave::Patch patch, int threads) {
  const int64_t area = patch.height * patch.width;
  const auto densities = values<T>(Rows::count * height * width / area);
  std::vector<T> tokens;
  for (T density : densities) tokens.insert(tokens.end(), static_cast<size_t>(area), density);
  Rows rows;
  std::fill(rows.signal.begin(), rows.signal.end(), 1.0);
  const std::vector<T> ones(static_cast<size_t>(2 * height * width), 1);
  const dave::Inputs inputs{{ones.data(), dtype, 2, 1, height, width}, rows.draws(), patch};
  const dave::Inputs sizes{{nullptr, dtype, 2, 1, height, width}, rows.draws(), patch};
  std::vector<T> mean(ones.size(), NAN), expected = mean;
  std::vector<double> variance(ones.size(), NAN), expected_variance = variance;
  const auto& kernels = dave::kernels();
  const int64_t samples = Rows::samples_an_image;
  kernels.pull_back_mean({tokens.data(), dtype}, inputs, samples, {expected.data(), expected_variance.data()}, threads);
  kernels.spread_mean({densities.data(), dtype}, sizes, samples, {mean.data(), variance.data()}, threads);
  require_finite(mean, "spread_mean left something unwritten");
  require(mean == expected && variance == expected_variance, "spread_mean is not pull_back_mean of equal pixels");
}

template <typename T>
void statistics(dave::Dtype dtype, int threads) {
  const auto& kernels = dave::kernels();
  for (int64_t samples : {1, 2, 3, 7, 50}) {
    for (int64_t pixels : {1, 31, 257}) {
      auto contributions = values<T>(2 * samples * pixels);
      contributions[0] = NAN;
      std::vector<T> raw(static_cast<size_t>(2 * pixels), 77);
      kernels.robust_mean({{contributions.data(), dtype}, 2, samples, 1, pixels}, {raw.data(), nullptr}, threads);
      require(std::isnan(raw[0]), "robust_mean hid a NaN");
      for (size_t i = 1; i < raw.size(); ++i) require(std::abs(raw[i]) <= 2, "robust_mean is out of range");
    }
  }
  for (int64_t height : {1, 4, 19}) {
    const auto raw = values<T>(2 * 3 * height * 7);
    std::vector<T> maps(static_cast<size_t>(2 * height * 7), NAN), shrunk = maps;
    const std::vector<double> variance(maps.size(), 0.1);
    kernels.shrink(variance.data(), {raw.data(), dtype, 2, 3, height, 7}, shrunk.data(), threads);
    // a sum of three, its mean, and its distance from that
    for (T value : shrunk) require(std::abs(value) <= 18, "shrink left something unwritten or is out of range");
    kernels.smooth({raw.data(), dtype, 2, 3, height, 7}, maps.data(), threads);
    for (T value : maps) require(value >= 0 && value <= 1, "smooth is out of range");
  }
}

// Writes and reads floats as what is stored: a float, or the upper half of its word.
float read(float value) { return value; }
float read(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
template <typename T>
T stored(double value) {
  const float narrow = static_cast<float>(value);
  if constexpr (sizeof(T) == sizeof(float)) return narrow;
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return static_cast<T>(bits >> 16);
}
template <typename T>
std::vector<T> stored_values(int64_t n, int first = 0) {
  std::vector<T> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = stored<T>(noise(i + first));
  return v;
}

bool near(float a, float b, double tolerance) { return std::abs(a - b) <= tolerance; }

// q, k and v are what they are in a packed projection: parts of one row of memory, which ends with the last v.
template <typename T>
void attend(dave::AttentionShape shape, int threads) {
  const auto& kernels = dave::kernels();
  const int64_t width = shape.heads * shape.dim, longest = std::max(shape.queries, shape.tokens);
  const auto packed = stored_values<T>(shape.rows * longest * 3 * width);
  const auto part = [&](int64_t i) {
    return dave::Heads{packed.data() + i * width, longest * 3 * width, 3 * width, shape.dim};
  };
  const int64_t pair = 4 / sizeof(T), columns = dave::padded_tokens(shape.tokens);
  const auto outputs = static_cast<size_t>(shape.rows * shape.queries * width);
  const auto values = static_cast<size_t>(shape.rows * shape.tokens * width);
  const int64_t saved_head = (shape.queries + pair - 1) / pair * columns;
  std::vector<uint32_t> words(static_cast<size_t>(shape.rows * shape.heads * saved_head), 0xFFFFFFFF);
  const auto queries = static_cast<size_t>(shape.rows * shape.heads * shape.queries);
  std::vector<float> peak(queries, NAN), share(queries, NAN);
  std::vector<T> out(outputs, stored<T>(NAN)), again = out, d_v(values, stored<T>(NAN)), d_v_again = d_v;
  const auto cotangent = stored_values<T>(static_cast<int64_t>(outputs), 7);
  const dave::Heads d_out{cotangent.data(), shape.queries * width, width, shape.dim};
  kernels.attention(shape, part(0), part(1), part(2), out.data(), {}, {words.data(), saved_head}, threads);
  kernels.attention(shape, part(0), part(1), part(2), again.data(), {peak.data(), share.data()}, {nullptr, 0}, threads);
  kernels.attention_vjp(shape, {}, {}, {}, {words.data(), saved_head}, d_out, d_v.data(), threads);
  kernels.attention_vjp(shape, part(0), part(1), {peak.data(), share.data()}, {nullptr, 0}, d_out, d_v_again.data(), threads);
  // a row of P sums to one: no output is larger than the largest value
  for (size_t i = 0; i < outputs; ++i) {
    require(std::abs(read(out[i])) <= 2.1f, "attention left something unwritten or is out of range");
    require(read(out[i]) == read(again[i]), "attention depends on what is saved");
  }
  const double tolerance = (sizeof(T) == 4 ? 1e-5 : 0.05) * static_cast<double>(shape.queries);
  for (size_t i = 0; i < values; ++i)
    require(near(read(d_v[i]), read(d_v_again[i]), tolerance), "kept and recomputed probabilities differ");
  // the inner product of out and d_out is that of v and d_v
  double there = 0, back = 0;
  for (size_t i = 0; i < outputs; ++i) there += read(out[i]) * read(cotangent[i]);
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int64_t n = 0; n < shape.tokens; ++n)
      for (int64_t d = 0; d < width; ++d)
        back += read(packed[((row * longest + n) * 3 + 2) * width + d]) * read(d_v[(row * shape.tokens + n) * width + d]);
  require(std::abs(there - back) <= (sizeof(T) == 4 ? 1e-5 : 0.02) * static_cast<double>(outputs),
          "attention_vjp is not the adjoint");
}

template <typename T>
void attentions(dave::Dtype dtype, int threads) {
  // rows, queries, tokens, heads, D: one of each, odd queries, tokens of no whole vector, several blocks of queries
  const int64_t shapes[][5] = {{1, 1, 1, 1, 1}, {2, 7, 5, 3, 9}, {1, 1, 33, 2, 16}, {2, 101, 17, 1, 36}, {1, 49, 97, 2, 21}};
  for (const auto& s : shapes) {
    // a word is two bfloat16: only even head dimensions
    const int64_t dim = sizeof(T) == 4 ? s[4] : s[4] + s[4] % 2;
    attend<T>({s[0], s[1], s[2], s[3], dim, 0.3f, dtype}, threads);
    // ends with its last value, so that reading past it is seen
    const auto bias = stored_values<T>(s[3] * s[1] * s[2], 3);
    attend<T>({s[0], s[1], s[2], s[3], dim, 0.3f, dtype, bias.data()}, threads);
  }
}

template <typename T>
void epilogues(dave::Dtype dtype, int threads) {
  const auto& kernels = dave::kernels();
  for (int64_t width : {1, 15, 16, 37}) {
    const int64_t rows = 5;
    const auto x = stored_values<T>(rows * width);
    std::vector<float> rstd(static_cast<size_t>(rows), NAN);
    std::vector<T> y(x.size(), stored<T>(NAN));
    for (bool centred : {true, false}) {
      kernels.row_rstd({x.data(), dtype}, rows, width, 1e-6f, centred, rstd.data(), threads);
      for (float r : rstd) require(r > 0 && r <= 1001, "row_rstd is out of range");
    }
    kernels.scale_rows({x.data(), dtype}, rstd.data(), rows, width, y.data(), threads);
    for (size_t i = 0; i < y.size(); ++i) {
      const float expected = read(x[i]) * rstd[i / static_cast<size_t>(width)];
      require(near(read(y[i]), expected, 0.01 * std::abs(expected)), "scale_rows is wrong");
    }
    for (int activation = 0; activation < dave::activations; ++activation)
      for (int gated = 0; gated < 3; ++gated) {
        const auto u = stored_values<T>(rows * width * (gated ? 2 : 1));
        std::vector<T> h(x.size(), stored<T>(NAN)), gate = h;
        kernels.activate({u.data(), dtype}, static_cast<dave::Activation>(activation), static_cast<dave::Gated>(gated),
                         rows, width, h.data(), gate.data(), threads);
        for (size_t i = 0; i < h.size(); ++i)
          require(std::abs(read(gate[i])) <= 2 && std::abs(read(h[i])) <= 4, "activate is out of range");
        if (gated) continue;
        auto in_place = u;
        kernels.activate({in_place.data(), dtype}, static_cast<dave::Activation>(activation), dave::Gated::no, rows, width,
                         in_place.data(), gate.data(), threads);
        require(in_place == h, "activate over its own input differs");
      }
  }
}

struct Tolerance {
  dave::Operand operand;
  double error;
};

// Every operand ends with its last value, so that reading past it is seen.
void linears() {
  const auto& products = dave::products();
  const Tolerance tolerances[] = {{dave::Operand::float32, 1e-6}, {dave::Operand::bfloat16, 1e-2}, {dave::Operand::int8, 2e-2}};
  // several panels and groups, and fewer rows than threads can share
  const int64_t shapes[][3] = {{1, 1, 1}, {5, 300, 50}, {131, 17, 24}, {70, 401, 257}};
  for (const auto& [rows, in, out] : shapes) {
    const auto x = stored_values<float>(rows * in), matrix = stored_values<float>(out * in, 3);
    const auto bias = stored_values<float>(out, 5), scale = stored_values<float>(rows, 7);
    auto other = stored_values<float>(rows * out, 9);
    std::vector<double> sums(other.size());
    for (int64_t at = 0; at < rows * out; ++at) {
      double sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += static_cast<double>(x[at / out * in + i]) * matrix[at % out * in + i];
      sums[at] = sum * scale[at / out] + bias[at % out];
    }
    const auto matrix_of = [](std::vector<float>& values) { return dave::Matrix{values.data(), dave::Dtype::float32}; };
    const dave::Matrix none{nullptr, dave::Dtype::float32};
    const dave::Rows operands{x.data(), dave::Dtype::float32, rows, in};
    const int relu = static_cast<int>(dave::Activation::relu);
    for (const auto& [operand, error] : tolerances) {
      const dave::PackedShape shape{operand, out, in, products.linear_panel};
      std::vector<uint32_t> packed(static_cast<size_t>(shape.panels() * shape.panel_words()), 0xFFFFFFFFu);
      products.pack_linear(matrix.data(), shape, packed.data());
      for (int threads : {1, 3, 4, 8}) {
        std::vector<float> y(other.size(), NAN), gate = y, h = y;
        products.linear(operands, shape, packed.data(),
                        {bias.data(), scale.data(), matrix_of(other), matrix_of(other), -1, none}, matrix_of(y), threads);
        products.linear(operands, shape, packed.data(),
                        {bias.data(), scale.data(), none, none, relu, matrix_of(gate)}, matrix_of(h), threads);
        for (size_t at = 0; at < y.size(); ++at) {
          const double sum = sums[at];
          // products, and sums by other, are up to 4 and twice as large
          const double tolerance = error * (4 * std::sqrt(static_cast<double>(in)) + std::abs(sum));
          require(near(y[at], static_cast<float>(sum * other[at] + other[at]), 2 * tolerance), "linear is wrong");
          require(near(h[at], static_cast<float>(sum > 0 ? sum : 0), tolerance), "linear's activation is wrong");
          require(gate[at] == (h[at] > 0 ? 1.0f : 0.0f), "linear's gate is wrong");
        }
      }
    }
  }
}

// A sum over the bits of products in eight-bit integers, which are the same in every instruction set and on every machine:
// 7 rows, 1,100 in-features, 21 out-features. tests/project/test_build.py makes it of the definition.
uint32_t products_in_bytes() {
  const auto& products = dave::products();
  const int64_t rows = 7, in = 1100, out = 21;
  const dave::PackedShape shape{dave::Operand::int8, out, in, products.linear_panel};
  // exact in float32, of both signs
  const auto numbers = [](int64_t n, int64_t step) {
    std::vector<float> v(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) v[static_cast<size_t>(i)] = static_cast<float>(i * i * step % 8191 - 4095) / 1024;
    return v;
  };
  const auto x = numbers(rows * in, 3), matrix = numbers(out * in, 7);
  std::vector<uint32_t> packed(static_cast<size_t>(shape.panels() * shape.panel_words()));
  std::vector<float> y(static_cast<size_t>(rows * out));
  const dave::Matrix none{nullptr, dave::Dtype::float32};
  products.pack_linear(matrix.data(), shape, packed.data());
  products.linear({x.data(), dave::Dtype::float32, rows, in}, shape, packed.data(), {nullptr, nullptr, none, none, -1, none},
                  {y.data(), dave::Dtype::float32}, 1);
  uint32_t sum = 0;
  for (float each : y) {
    uint32_t bits;
    std::memcpy(&bits, &each, sizeof bits);
    sum = 31 * sum + bits;
  }
  return sum;
}

}  // namespace

int main() {
  for (const dave::Build& build : dave::usable()) {
    require(dave::use_isa(build.isa), "a usable instruction set cannot be used");
    linears();
    for (int threads : {1, 3}) {
      warps<float>(dave::Dtype::float32, 3, 10, 14, {5, 7}, threads);
      warps<double>(dave::Dtype::float64, 1, 9, 3, {3, 1}, threads);
      warps<float>(dave::Dtype::float32, 4, 17, 33, {17, 33}, threads);
      spreads<float>(dave::Dtype::float32, 10, 14, {5, 7}, threads);
      spreads<double>(dave::Dtype::float64, 9, 3, {3, 1}, threads);
      spreads<float>(dave::Dtype::float32, 34, 65, {17, 65}, threads);
      statistics<float>(dave::Dtype::float32, threads);
      statistics<double>(dave::Dtype::float64, threads);
      attentions<float>(dave::Dtype::float32, threads);
      attentions<uint16_t>(dave::Dtype::bfloat16, threads);
      epilogues<float>(dave::Dtype::float32, threads);
      epilogues<uint16_t>(dave::Dtype::bfloat16, threads);
      for (int64_t elements : {1, 5, 1025}) {
        const int64_t keys[2] = {1, 2}, samples[1] = {3};
        std::vector<float> deviates(static_cast<size_t>(elements), NAN);
        dave::kernels().normal(keys, samples, 1, elements, deviates.data(), threads);
        require_finite(deviates, "normal left something unwritten");
      }
    }
    std::printf("%s passed, products in bytes: %08x\n", build.isa, products_in_bytes());
  }
  require(!dave::use_isa("mmx"), "an unknown instruction set is taken");
  std::puts("smoke test passed");
}
