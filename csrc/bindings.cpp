// dave_fast._native: takes pointers as integers, sizes, dtype codes and the number of threads, without torch.
#include <cmath>

#include "arguments.h"
#include "dispatch.h"

namespace py = pybind11;
using dave::Dtype;

namespace {

void check_matrices(const dave::Draws& draws) {
  for (int64_t r = 0; r < draws.rows; ++r) {
    const double* m = draws.matrices + 6 * r;
    const double determinant = m[0] * m[4] - m[1] * m[3];
    if (!std::isfinite(determinant) || determinant == 0 || !std::isfinite(m[2]) || !std::isfinite(m[5]))
      throw std::invalid_argument("draws.matrices must be finite and invertible");
  }
}

// Checks the draws too, which the host can read.
dave::Inputs checked(Address images, Dtype dtype, const Shape& shape, const DrawsFields& fields, int64_t rows, int64_t p_h,
                     int64_t p_w) {
  const dave::Inputs inputs = inputs_of(images, dtype, shape, fields, rows, {p_h, p_w});
  for (int64_t r = 0; r < rows; ++r)
    if (inputs.draws.image_index[r] < 0 || inputs.draws.image_index[r] >= inputs.images.count)
      throw std::invalid_argument("draws.image_index is outside of the batch");
  check_matrices(inputs.draws);
  return inputs;
}

void perturb(Address images, Dtype dtype, const Shape& shape, const DrawsFields& draws, int64_t rows, int64_t p_h,
             int64_t p_w, Address tokens, Dtype stored, int threads) {
  dave::kernels().perturb(checked(images, dtype, shape, draws, rows, p_h, p_w), {tokens, stored}, threads);
}

void pull_back(Address cotangents, Dtype given, Address images, Dtype dtype, const Shape& shape, const DrawsFields& draws,
               int64_t rows, int64_t p_h, int64_t p_w, Address contributions, Dtype stored, int threads) {
  const auto inputs = checked(images, dtype, shape, draws, rows, p_h, p_w);
  dave::kernels().pull_back({cotangents, given}, inputs, {contributions, stored}, threads);
}

void pull_back_mean_variance(Address cotangents, Dtype given, Address images, Dtype dtype, const Shape& shape,
                             const DrawsFields& draws, int64_t rows, int64_t p_h, int64_t p_w, int64_t samples,
                             Address raw, Address variance, int threads) {
  const auto inputs = checked(images, dtype, shape, draws, rows, p_h, p_w);
  if (samples < 1 || rows % samples) throw std::invalid_argument("rows must be a multiple of the samples");
  dave::kernels().pull_back_mean({cotangents, given}, inputs, samples, {raw, variance}, threads);
}

void pull_back_mean(Address cotangents, Dtype given, Address images, Dtype dtype, const Shape& shape,
                    const DrawsFields& draws, int64_t rows, int64_t p_h, int64_t p_w, int64_t samples, Address raw,
                    int threads) {
  pull_back_mean_variance(cotangents, given, images, dtype, shape, draws, rows, p_h, p_w, samples, raw, {}, threads);
}

void spread_mean_variance(Address densities, Dtype dtype, int64_t length, const DrawsFields& draws, int64_t rows,
                          int64_t height, int64_t width, int64_t p_h, int64_t p_w, int64_t samples, Address mean,
                          Address variance, int threads) {
  const auto inputs = sizes_of(length, dtype, height, width, draws, rows, {p_h, p_w}, samples);
  check_matrices(inputs.draws);
  dave::kernels().spread_mean({densities, dtype}, inputs, samples, {mean, variance}, threads);
}

void normal(Address keys, Address samples, int64_t rows, int64_t elements, Address deviates, int threads) {
  dave::kernels().normal(keys, samples, rows, elements, deviates, threads);
}

void robust_mean_variance(Address contributions, Dtype given, int64_t images, int64_t samples, int64_t channels,
                          int64_t pixels, Address raw, Address variance, int threads) {
  if (samples < 1 || channels < 1) throw std::invalid_argument("there must be a sample and a channel");
  dave::kernels().robust_mean({{contributions, given}, images, samples, channels, pixels}, {raw, variance}, threads);
}

void robust_mean(Address contributions, Dtype given, int64_t images, int64_t samples, int64_t pixels, Address raw,
                 int threads) {
  robust_mean_variance(contributions, given, images, samples, 1, pixels, raw, {}, threads);
}

void shrink(Address variance, Address raw, Dtype dtype, const Shape& shape, Address shrunk, int threads) {
  dave::kernels().shrink(variance, images_of(raw, dtype, shape), shrunk, threads);
}

void smooth(Address raw, Dtype dtype, const Shape& shape, Address maps, int threads) {
  dave::kernels().smooth(images_of(raw, dtype, shape), maps, threads);
}

// The strides (row, token, head) of (rows, tokens, heads, D), in elements
using Strides = std::array<int64_t, 3>;
// rows, queries, tokens, heads, D
using Sizes = std::array<int64_t, 5>;

dave::Heads heads_of(Address data, const Strides& strides) { return {data, strides[0], strides[1], strides[2]}; }

dave::AttentionShape attention_shape(const Sizes& sizes, float scale, Dtype dtype, Address bias) {
  if (dtype != Dtype::float32 && !(dtype == Dtype::bfloat16 && dave::kernels().multiplies_bfloat16))
    throw std::invalid_argument("this instruction set's attention does not take that type");
  if (dtype == Dtype::bfloat16 && sizes[4] % 2) throw std::invalid_argument("bfloat16 needs an even head dimension");
  if (!(scale > 0)) throw std::invalid_argument("attention's scale must be positive");
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], scale, dtype, bias};
}

// (2, rows, heads, queries) by its address, 0 for none
dave::PeakAndShare peak_and_share(float* peak, const Sizes& sizes) {
  return {peak, peak ? peak + sizes[0] * sizes[3] * sizes[1] : nullptr};
}

void attention(const Sizes& sizes, float scale, Dtype dtype, Address bias, Address q, const Strides& q_strides, Address k,
               const Strides& k_strides, Address v, const Strides& v_strides, Address out, Address kept, Address saved,
               int64_t saved_head, int threads) {
  dave::kernels().attention(attention_shape(sizes, scale, dtype, bias), heads_of(q, q_strides), heads_of(k, k_strides),
                            heads_of(v, v_strides), out, peak_and_share(kept, sizes), {saved, saved_head}, threads);
}

void attention_vjp(const Sizes& sizes, float scale, Dtype dtype, Address bias, Address q, const Strides& q_strides,
                   Address k, const Strides& k_strides, Address kept, Address saved, int64_t saved_head, Address d_out,
                   const Strides& d_out_strides, Address d_v, int threads) {
  dave::kernels().attention_vjp(attention_shape(sizes, scale, dtype, bias), heads_of(q, q_strides), heads_of(k, k_strides),
                                peak_and_share(kept, sizes), {saved, saved_head}, heads_of(d_out, d_out_strides), d_v,
                                threads);
}

dave::Values epilogue_values(Address data, Dtype dtype) {
  if (dtype == Dtype::float32 || dtype == Dtype::bfloat16) return {data, dtype};
  throw std::invalid_argument("an epilogue reads float32 or bfloat16");
}

void row_rstd(Address x, Dtype dtype, int64_t rows, int64_t width, float eps, bool centred, Address rstd, int threads) {
  dave::kernels().row_rstd(epilogue_values(x, dtype), rows, width, eps, centred, rstd, threads);
}

void scale_rows(Address x, Dtype dtype, Address scale, int64_t rows, int64_t width, Address y, int threads) {
  dave::kernels().scale_rows(epilogue_values(x, dtype), scale, rows, width, y, threads);
}

void activate(Address u, Dtype dtype, int activation, int gated, int64_t rows, int64_t hidden, Address h, Address gate,
              int threads) {
  if (activation < 0 || activation >= dave::activations || gated < 0 || gated > 2)
    throw std::invalid_argument("unknown activation");
  dave::kernels().activate(epilogue_values(u, dtype), static_cast<dave::Activation>(activation),
                           static_cast<dave::Gated>(gated), rows, hidden, h, gate, threads);
}

void pack_linear(Address matrix, int64_t out, int64_t in, Address weights) {
  if (!dave::kernels().linear_panel) throw std::invalid_argument("this instruction set leaves linear to a library");
  if (out < 1 || in < 1) throw std::invalid_argument("linear needs an in-feature and an out-feature");
  dave::kernels().pack_linear(matrix, out, in, weights);
}

// panel: what linear_panel was when the weights were packed; operands: bias, row_scale, gate, residual
void linear(Address x, int64_t rows, int64_t stride, int64_t in, Address weights, int64_t panel, int64_t out,
            const std::array<Address, 4>& operands, int activation, Address new_gate, Address y, int threads) {
  if (!panel || panel != dave::kernels().linear_panel)
    throw std::invalid_argument("the weights were packed for another instruction set");
  if (activation < -1 || activation >= dave::activations) throw std::invalid_argument("unknown activation");
  const auto& [bias, row_scale, gate, residual] = operands;
  if (activation >= 0 && ((rows && !new_gate.value) || gate.value || residual.value))
    throw std::invalid_argument("an activation writes its gate, and goes with neither a gate nor a residual");
  dave::kernels().linear(x, rows, stride, in, weights, out, {bias, row_scale, gate, residual, activation, new_gate}, y,
                         threads);
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const dave::Kernels* build : dave::usable()) names.emplace_back(build->isa);
  return names;
}

void use_isa(const std::string& name) {
  if (dave::use_isa(name)) return;
  std::string names;
  for (const dave::Kernels* build : dave::usable()) names += (names.empty() ? "" : ", ") + std::string(build->isa);
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not in this machine; it has " + names);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "The host kernels of dave-fast. Addresses are taken as they are: call them through dave_fast.ops.";
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
  module.def("linear_panel", [] { return dave::kernels().linear_panel; },
             "Columns of a panel of linear's weights; 0 without a linear kernel.");
  module.def("pack_linear", &pack_linear, release());
  module.def("linear", &linear, release());
  module.def("multiplies_bfloat16", [] { return dave::kernels().multiplies_bfloat16; },
             "Whether attention takes bfloat16.");
  module.def("isa", [] { return std::string(dave::kernels().isa); }, "The instruction set in use.");
  module.def("usable_isas", &usable_isas, "The instruction sets this machine can run, best first.");
  module.def("use_isa", &use_isa, "Take the kernels of one instruction set.");
}
