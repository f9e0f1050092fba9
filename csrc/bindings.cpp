// dave_fast._native: takes tensors by their memory (arguments.h), sizes and the number of threads, without torch.
#include "arguments.h"
#include "dispatch.h"
#include "warp.h"

namespace py = pybind11;
using dave::Dtype;

namespace {

enum class Maps { bounded, invertible };

// Checks the draws' matrices, and with images to read their indices: the host can read them.
void check_rows(const dave::Inputs& inputs, Maps maps) {
  const auto& [images, draws, patch] = inputs;
  for (int64_t r = 0; r < draws.rows; ++r) {
    expect(!images.data || (draws.image_index[r] >= 0 && draws.image_index[r] < images.count),
           "draws.image_index is outside of the batch");
    const double* matrix = draws.matrices + 6 * r;
    expect(dave::portable::is_bounded(matrix), "draws.matrices must be finite, of at most 2^60");
    if (maps == Maps::invertible)
      expect(dave::portable::is_bounded(dave::portable::Inverse(matrix).matrix),
             "draws.matrices must be invertible, with inverses of at most 2^60");
  }
}

dave::Inputs checked(const Array& images, const Shape& shape, const DrawsFields& fields, int64_t p_h, int64_t p_w,
                     Maps maps) {
  const dave::Inputs inputs = inputs_of(images_of(images, shape), fields, p_h, p_w);
  check_rows(inputs, maps);
  return inputs;
}

void perturb(const Array& images, const Shape& shape, const DrawsFields& draws, int64_t p_h, int64_t p_w,
             const Array& tokens, Threads threads) {
  const auto inputs = checked(images, shape, draws, p_h, p_w, Maps::bounded);
  const dave::Output to = output_of(tokens, values_of_rows(inputs), "tokens");
  expect_apart(tokens, {images});
  dave::kernels().perturb(inputs, to, threads);
}

void pull_back(const Array& cotangents, const Array& images, const Shape& shape, const DrawsFields& draws, int64_t p_h,
               int64_t p_w, const Array& contributions, Threads threads) {
  const auto inputs = checked(images, shape, draws, p_h, p_w, Maps::invertible);
  const int64_t length = values_of_rows(inputs);
  const dave::Values from = values_of(cotangents, length, "cotangents");
  const dave::Output to = output_of(contributions, length, "contributions");
  expect_apart(contributions, {cotangents, images});
  dave::kernels().pull_back(from, inputs, to, threads);
}

void pull_back_mean_variance(const Array& cotangents, const Array& images, const Shape& shape, const DrawsFields& draws,
                             int64_t p_h, int64_t p_w, int64_t samples, const Array& raw, const Optional& variance,
                             Threads threads) {
  const auto inputs = checked(images, shape, draws, p_h, p_w, Maps::invertible);
  const auto& [count, channels, height, width] = shape;
  const int64_t groups = groups_of(inputs.draws.rows, samples);
  const dave::Values from = values_of(cotangents, values_of_rows(inputs), "cotangents");
  const dave::Means to = means_of(raw, variance, inputs.images.dtype, groups, channels, height * width);
  expect_apart(raw, {cotangents, images});
  if (variance) expect_apart(*variance, {cotangents, images});
  if (groups) dave::kernels().pull_back_mean(from, inputs, samples, to, threads);
}

void pull_back_mean(const Array& cotangents, const Array& images, const Shape& shape, const DrawsFields& draws, int64_t p_h,
                    int64_t p_w, int64_t samples, const Array& raw, Threads threads) {
  pull_back_mean_variance(cotangents, images, shape, draws, p_h, p_w, samples, raw, {}, threads);
}

void spread_mean_variance(const Array& densities, const DrawsFields& draws, int64_t height, int64_t width, int64_t p_h,
                          int64_t p_w, int64_t samples, const Array& mean, const Array& variance, Threads threads) {
  const auto inputs = map_inputs_of(densities, draws, height, width, p_h, p_w, samples);
  check_rows(inputs, Maps::invertible);
  const dave::Values from = values_of(densities, patches_of_rows(inputs), "densities");
  const dave::Means to = means_of(mean, variance, inputs.images.dtype, inputs.images.count, 1, height * width, "mean");
  expect_apart(mean, {densities});
  expect_apart(variance, {densities});
  if (inputs.images.count) dave::kernels().spread_mean(from, inputs, samples, to, threads);
}

void normal(const Array& keys, const Array& samples, int64_t elements, const Array& deviates, Threads threads) {
  const int64_t rows = count_of({samples.length}), length = count_of({rows, elements});
  const auto* key_words = memory_of<int64_t>(keys, 2 * rows, "keys");
  const auto* numbers = memory_of<int64_t>(samples, rows, "samples");
  auto* to = memory_of<float>(deviates, length, "deviates");
  expect_apart(deviates, {keys, samples});
  dave::kernels().normal(key_words, numbers, rows, elements, to, threads);
}

void robust_mean_variance(const Array& contributions, int64_t images, int64_t samples, int64_t channels, int64_t pixels,
                          const Array& raw, const Optional& variance, Threads threads) {
  const auto from = contributions_of(contributions, images, samples, channels, pixels);
  const dave::Means to = means_of(raw, variance, statistics_of(from.values.dtype), images, channels, pixels);
  expect_apart(raw, {contributions});
  if (variance) expect_apart(*variance, {contributions});
  // without a pixel there would be a sorting network all the same
  if (images && pixels) dave::kernels().robust_mean(from, to, threads);
}

void robust_mean(const Array& contributions, int64_t images, int64_t samples, int64_t pixels, const Array& raw,
                 Threads threads) {
  robust_mean_variance(contributions, images, samples, 1, pixels, raw, {}, threads);
}

void shrink(const Array& variance, const Array& raw, const Shape& shape, const Array& shrunk, Threads threads) {
  const dave::Images images = images_of(raw, shape, "raw");
  const int64_t length = images.count * images.height * images.width;
  const auto* spread = memory_of<double>(variance, length, "variance");
  void* to = result_of(shrunk, length, images.dtype, "shrunk");
  expect_apart(shrunk, {variance, raw});
  dave::kernels().shrink(spread, images, to, threads);
}

void smooth(const Array& raw, const Shape& shape, const Array& maps, Threads threads) {
  const dave::Images images = images_of(raw, shape, "raw");
  void* to = result_of(maps, images.count * images.height * images.width, images.dtype, "maps");
  expect_apart(maps, {raw});
  dave::kernels().smooth(images, to, threads);
}

// The strides (row, token, head) of (rows, tokens, heads, D), in elements
using Strides = std::array<int64_t, 3>;
// rows, queries, tokens, heads, D
using Sizes = std::array<int64_t, 5>;

// (rows, tokens, heads, D) in `array`, which reaches from its first to its last value
dave::Heads heads_of(const Array& array, const Strides& strides, const dave::AttentionShape& shape, int64_t tokens) {
  const std::array<int64_t, 3> sizes{shape.rows, tokens, shape.heads};
  __int128 reached = shape.dim;
  for (size_t i = 0; i < sizes.size(); ++i) {
    expect(strides[i] >= 0, "a stride must not be negative");
    reached += static_cast<__int128>(sizes[i] - 1) * strides[i];
  }
  expect(shape.rows == 0 || reached <= array.length, "attention's sizes and strides reach beyond its operand");
  expect(array.dtype == static_cast<int>(shape.dtype), "attention's operands must be of one type");
  return {memory_of(array, array.length, "an operand of attention"), strides[0], strides[1], strides[2]};
}

// What is read two bfloat16 at a time.
dave::Heads even_heads_of(const Array& array, const Strides& strides, const dave::AttentionShape& shape, int64_t tokens) {
  if (shape.dtype == Dtype::bfloat16)
    expect(array.address % 4 == 0 && (strides[0] | strides[1] | strides[2]) % 2 == 0,
           "bfloat16 queries need even strides and whole words");
  return heads_of(array, strides, shape, tokens);
}

dave::AttentionShape attention_shape(const Sizes& sizes, float scale, int dtype, const Optional& bias) {
  const bool halves = dtype == static_cast<int>(Dtype::bfloat16);
  expect(dtype == code_of<float> || halves,
         "this instruction set's attention does not take that type");
  expect(!halves || sizes[4] % 2 == 0, "bfloat16 needs an even head dimension");
  expect(scale > 0, "attention's scale must be positive");
  const auto [rows, queries, tokens, heads, dim] = sizes;
  expect(queries >= 1 && tokens >= 1 && heads >= 1 && dim >= 1, "attention needs queries, tokens and heads");
  count_of({rows, queries, heads, dim}), count_of({rows, tokens, heads, dim}), count_of({rows, heads, queries, tokens});
  expect(!bias || bias->dtype == dtype, "attention's bias must be of its operands' type");
  const void* memory = bias ? memory_of(*bias, heads * queries * tokens, "attention's bias") : nullptr;
  return {rows, queries, tokens, heads, dim, scale, static_cast<Dtype>(dtype), memory};
}

// (2, rows, heads, queries), or empty
dave::PeakAndShare peak_and_share(const Array& kept, const dave::AttentionShape& shape) {
  const int64_t queries = shape.rows * shape.heads * shape.queries;
  if (kept.length == 0) return {nullptr, nullptr};
  float* const peak = memory_of<float>(kept, 2 * queries, "attention's peak and share");
  return {peak, peak + queries};
}

// (rows, heads, lines, padded tokens), or empty
dave::SavedProbabilities saved_of(const Array& words, const dave::AttentionShape& shape) {
  const int64_t lines = shape.dtype == Dtype::bfloat16 ? (shape.queries + 1) / 2 : shape.queries;
  const int64_t head = lines * dave::padded_tokens(shape.tokens);
  if (words.length == 0) return {nullptr, head};
  auto* const memory = memory_of<int32_t>(words, count_of({shape.rows, shape.heads, head}), "attention's words");
  return {reinterpret_cast<uint32_t*>(memory), head};
}

void attention(const Sizes& sizes, float scale, const Optional& bias, const Array& q, const Strides& q_strides,
               const Array& k, const Strides& k_strides, const Array& v, const Strides& v_strides, const Array& out,
               const Array& kept, const Array& saved, Threads threads) {
  const auto shape = attention_shape(sizes, scale, q.dtype, bias);
  const auto queries = even_heads_of(q, q_strides, shape, shape.queries), keys = heads_of(k, k_strides, shape, shape.tokens);
  const auto values = heads_of(v, v_strides, shape, shape.tokens);
  void* const to = result_of(out, shape.rows * shape.queries * shape.heads * shape.dim, shape.dtype, "out");
  const auto parts = peak_and_share(kept, shape);
  const auto words = saved_of(saved, shape);
  for (const Array& output : {out, kept, saved}) expect_apart(output, {q, k, v});
  dave::kernels().attention(shape, queries, keys, values, to, parts, words, threads);
}

void attention_vjp(const Sizes& sizes, float scale, const Optional& bias, const Array& q, const Strides& q_strides,
                   const Array& k, const Strides& k_strides, const Array& kept, const Array& saved, const Array& d_out,
                   const Strides& d_out_strides, const Array& d_v, Threads threads) {
  const auto shape = attention_shape(sizes, scale, d_out.dtype, bias);
  const auto parts = peak_and_share(kept, shape);
  const auto words = saved_of(saved, shape);
  const auto cotangents = heads_of(d_out, d_out_strides, shape, shape.queries);
  // q and k are read where P was not saved
  expect(words.words || parts.peak || shape.rows == 0, "attention's P is neither saved nor can be computed again");
  const auto queries = words.words ? dave::Heads{} : even_heads_of(q, q_strides, shape, shape.queries);
  const auto keys = words.words ? dave::Heads{} : heads_of(k, k_strides, shape, shape.tokens);
  void* const to = result_of(d_v, shape.rows * shape.tokens * shape.heads * shape.dim, shape.dtype, "d_v");
  expect_apart(d_v, {q, k, kept, saved, d_out});
  dave::kernels().attention_vjp(shape, queries, keys, parts, words, cotangents, to, threads);
}

dave::Values epilogue_values(const Array& array, int64_t length, const char* name) {
  const dave::Values values = values_of(array, length, name);
  expect(values.dtype == Dtype::float32 || values.dtype == Dtype::bfloat16, "an epilogue reads float32 or bfloat16");
  return values;
}

void row_rstd(const Array& x, int64_t rows, int64_t width, float eps, bool centred, const Array& rstd, Threads threads) {
  expect(width >= 1, "rows must have values");
  const dave::Values from = epilogue_values(x, count_of({rows, width}), "x");
  float* const to = memory_of<float>(rstd, rows, "rstd");
  expect_apart(rstd, {x});
  dave::kernels().row_rstd(from, rows, width, eps, centred, to, threads);
}

void scale_rows(const Array& x, const Array& scale, int64_t rows, int64_t width, const Array& y, Threads threads) {
  const int64_t length = count_of({rows, width});
  const dave::Values from = epilogue_values(x, length, "x");
  const auto* factors = memory_of<float>(scale, rows, "row_scale");
  void* const to = result_of(y, length, from.dtype, "y");
  expect_apart(y, {x, scale});
  dave::kernels().scale_rows(from, factors, rows, width, to, threads);
}

// h may be u itself where there is no gated MLP.
void activate(const Array& u, int activation, int gated, int64_t rows, int64_t hidden, const Array& h, const Array& gate,
              Threads threads) {
  expect(activation >= 0 && activation < dave::activations && gated >= 0 && gated <= 2, "unknown activation");
  const int64_t length = count_of({rows, hidden}), halves = gated ? 2 : 1;
  const dave::Values from = epilogue_values(u, halves * length, "u");
  void* const to = result_of(h, length, from.dtype, "h");
  void* const gates = result_of(gate, length, from.dtype, "gate");
  if (gated || h.address != u.address) expect_apart(h, {u});
  expect_apart(gate, {u, h});
  dave::kernels().activate(from, static_cast<dave::Activation>(activation), static_cast<dave::Gated>(gated), rows, hidden,
                           to, gates, threads);
}

dave::PackedShape packed_shape(int operand, int64_t out, int64_t in, int64_t panel) {
  expect(operand >= 0 && operand < dave::operands, "linear's operand is unknown");
  expect(panel > 0 && panel == dave::products().linear_panel, "the weights were packed for another instruction set");
  expect(out >= 1 && in >= 1, "linear needs an in-feature and an out-feature");
  count_of({out, in});
  // a panel has a start for each group and a scale besides its words
  count_of({in + 2, (out + panel - 1) / panel * panel});
  return {static_cast<dave::Operand>(operand), out, in, panel};
}

int64_t packed_length(int operand, int64_t out, int64_t in, int64_t panel) {
  const dave::PackedShape shape = packed_shape(operand, out, in, panel);
  return shape.panels() * shape.panel_words();
}

void pack_linear(const Array& matrix, int operand, int64_t out, int64_t in, int64_t panel, const Array& packed) {
  const dave::PackedShape shape = packed_shape(operand, out, in, panel);
  auto* const to = memory_of<int32_t>(packed, shape.panels() * shape.panel_words(), "packed weights");
  const auto* from = memory_of<float>(matrix, out * in, "matrix");
  expect_apart(packed, {matrix});
  dave::products().pack_linear(from, shape, reinterpret_cast<uint32_t*>(to));
}

dave::Matrix matrix_of(const Optional& array, int64_t length, const char* name) {
  if (!array) return {nullptr, Dtype::float32};
  return {const_cast<void*>(epilogue_values(*array, length, name).data), static_cast<Dtype>(array->dtype)};
}

// panel: what linear_panel was when the weights were packed; operands: bias, row_scale, gate, residual. y may be the
// residual itself.
void linear(const Array& x, int64_t rows, int64_t stride, const Array& weights, int operand, int64_t out, int64_t in,
            int64_t panel, const std::array<Optional, 4>& operands, int activation, const Optional& new_gate,
            const Array& y, Threads threads) {
  const dave::PackedShape shape = packed_shape(operand, out, in, panel);
  expect(activation >= -1 && activation < dave::activations, "unknown activation");
  const auto* packed = memory_of<int32_t>(weights, shape.panels() * shape.panel_words(), "packed weights");
  const int64_t length = count_of({rows, out});
  count_of({rows, in});
  expect(stride >= 0 && (rows == 0 || static_cast<__int128>(rows - 1) * stride + in <= x.length),
         "linear's sizes and stride reach beyond x");
  const dave::Values from = epilogue_values(x, x.length, "x");
  const auto& [bias, row_scale, gate, residual] = operands;
  expect(activation < 0 || (new_gate && !gate && !residual),
         "an activation writes its gate, and goes with neither a gate nor a residual");
  const dave::Epilogue epilogue{memory_of<float>(bias, out, "bias"),
                                memory_of<float>(row_scale, rows, "row_scale"),
                                matrix_of(gate, length, "gate"),
                                matrix_of(residual, length, "residual"),
                                activation,
                                matrix_of(new_gate, length, "the new gate")};
  const dave::Matrix to = matrix_of(y, length, "y");
  const bool in_place = residual && residual->address == y.address && residual->dtype == y.dtype;
  for (const Optional& output : {Optional(y), new_gate}) {
    if (!output) continue;
    expect_apart(*output, {x, weights});
    for (const Optional& other : operands)
      if (other && !(in_place && &other == &residual)) expect_apart(*output, {*other});
  }
  if (new_gate) expect_apart(y, {*new_gate});
  dave::products().linear({from.data, from.dtype, rows, stride}, shape, reinterpret_cast<const uint32_t*>(packed),
                          epilogue, to, threads);
}

bool multiplies_bytes(bool whichever) {
  if (!whichever) return dave::products().multiplies_bytes;
  for (const dave::Build& build : dave::usable())
    if (build.products->multiplies_bytes) return true;
  return false;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const dave::Build& build : dave::usable()) names.emplace_back(build.isa);
  return names;
}

void use_isa(const std::string& name) {
  if (dave::use_isa(name)) return;
  std::string names;
  for (const dave::Build& build : dave::usable()) names += (names.empty() ? "" : ", ") + std::string(build.isa);
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not in this machine; it has " + names);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "The host kernels of dave-fast. A tensor is (address, number of values, dtype code): call them through dave_fast.ops.";
  module.def("perturb", &perturb, release());
  module.def("pull_back", &pull_back, release());
  module.def("pull_back_mean", &pull_back_mean, release());
  module.def("pull_back_mean_variance", &pull_back_mean_variance, release());
  module.def("spread_mean_variance", &spread_mean_variance, release());
  module.def("normal", &normal, release());
  module.def("robust_mean", &robust_mean, release());
  module.def("robust_mean_variance", &robust_mean_variance, release());
  module.def("shrink", &shrink, release());
  module.def("smooth", &smooth, release());
  module.def("attention", &attention, release());
  module.def("attention_vjp", &attention_vjp, release());
  module.def("row_rstd", &row_rstd, release());
  module.def("scale_rows", &scale_rows, release());
  module.def("activate", &activate, release());
  module.def("linear_panel", [] { return dave::products().linear_panel; }, "Columns of a panel of linear's weights.");
  module.def("packed_length", &packed_length, "The words of packed weights.");
  module.def("pack_linear", &pack_linear, release());
  module.def("linear", &linear, release());
  module.def("multiplies_bfloat16", [] { return dave::kernels().multiplies_bfloat16; },
             "Whether bfloat16 is multiplied by an instruction of its own.");
  module.def("multiplies_bytes", &multiplies_bytes,
             "Whether the instruction set in use, or whichever of this machine's, has an instruction that multiplies bytes.");
  module.def("isa", [] { return std::string(dave::isa()); }, "The instruction set in use.");
  module.def("usable_isas", &usable_isas, "The instruction sets this machine can run, best first.");
  module.def("use_isa", &use_isa, "Take the kernels of one instruction set.");
}
