// dave_fast._native: takes pointers as integers, sizes, dtype codes and the number of threads, without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <vector>

#include "arguments.h"
#include "dispatch.h"

namespace py = pybind11;

namespace {

// Checks shapes, and the draws, which the host can read.
void check(const dave::Images& images, const dave::Draws& draws, dave::Patch patch) {
  check_shapes(images, patch);
  for (int64_t r = 0; r < draws.rows; ++r) {
    if (draws.image_index[r] < 0 || draws.image_index[r] >= images.count)
      throw std::invalid_argument("draws.image_index is outside of the batch");
    const double* m = draws.matrices + 6 * r;
    const double determinant = m[0] * m[4] - m[1] * m[3];
    if (!std::isfinite(determinant) || determinant == 0 || !std::isfinite(m[2]) || !std::isfinite(m[5]))
      throw std::invalid_argument("draws.matrices must be finite and invertible");
  }
}

void perturb(uintptr_t images, int dtype, const std::vector<int64_t>& shape, const std::vector<uintptr_t>& draws,
             int64_t rows, int64_t p_h, int64_t p_w, uintptr_t tokens, int stored, int threads) {
  const auto images_ = images_of(images, dtype, shape);
  const auto draws_ = draws_of(draws, rows);
  check(images_, draws_, {p_h, p_w});
  dave::kernels().perturb(images_, draws_, {p_h, p_w}, pointer<void>(tokens), stored_dtype(stored), threads);
}

void pull_back(uintptr_t cotangents, int given, uintptr_t images, int dtype, const std::vector<int64_t>& shape,
               const std::vector<uintptr_t>& draws, int64_t rows, int64_t p_h, int64_t p_w, uintptr_t contributions,
               int stored, int threads) {
  const auto images_ = images_of(images, dtype, shape);
  const auto draws_ = draws_of(draws, rows);
  check(images_, draws_, {p_h, p_w});
  dave::kernels().pull_back(pointer<const void>(cotangents), stored_dtype(given), images_, draws_, {p_h, p_w},
                            pointer<void>(contributions), stored_dtype(stored), threads);
}

void pull_back_mean(uintptr_t cotangents, int given, uintptr_t images, int dtype, const std::vector<int64_t>& shape,
                    const std::vector<uintptr_t>& draws, int64_t rows, int64_t p_h, int64_t p_w, int64_t samples,
                    uintptr_t raw, int threads) {
  const auto images_ = images_of(images, dtype, shape);
  const auto draws_ = draws_of(draws, rows);
  check(images_, draws_, {p_h, p_w});
  if (samples < 1 || rows % samples) throw std::invalid_argument("rows must be a multiple of the samples");
  dave::kernels().pull_back_mean(pointer<const void>(cotangents), stored_dtype(given), images_, draws_, {p_h, p_w}, samples,
                                 pointer<void>(raw), threads);
}

void normal(uintptr_t keys, uintptr_t samples, int64_t rows, int64_t elements, uintptr_t deviates, int threads) {
  dave::kernels().normal(pointer<const int64_t>(keys), pointer<const int64_t>(samples), rows, elements,
                         pointer<float>(deviates), threads);
}

void robust_mean(uintptr_t contributions, int given, int64_t images, int64_t samples, int64_t pixels, uintptr_t raw,
                 int threads) {
  if (samples < 1) throw std::invalid_argument("there must be a sample");
  dave::kernels().robust_mean(pointer<const void>(contributions), stored_dtype(given), images, samples, pixels,
                              pointer<void>(raw), threads);
}

void smooth(uintptr_t raw, int dtype, const std::vector<int64_t>& shape, uintptr_t maps, int threads) {
  dave::kernels().smooth(images_of(raw, dtype, shape), pointer<void>(maps), threads);
}

// (rows, tokens, heads, D) by its address and its strides (row, token, head) in elements
dave::Heads heads_of(uintptr_t data, const std::vector<int64_t>& strides) {
  if (strides.size() != 3) throw std::invalid_argument("heads have three strides");
  return {pointer<const void>(data), strides[0], strides[1], strides[2]};
}

// shape: rows, queries, tokens, heads, D
dave::AttentionShape attention_shape(const std::vector<int64_t>& shape, float scale, int dtype, uintptr_t bias) {
  if (shape.size() != 5) throw std::invalid_argument("an attention shape has five sizes");
  const auto type = dtype_of(dtype);
  if (type == dave::Dtype::float64 || (type == dave::Dtype::bfloat16 && !dave::kernels().multiplies_bfloat16))
    throw std::invalid_argument("this instruction set's attention does not take that type");
  if (type == dave::Dtype::bfloat16 && shape[4] % 2) throw std::invalid_argument("bfloat16 needs an even head dimension");
  if (!(scale > 0)) throw std::invalid_argument("attention's scale must be positive");
  return {shape[0], shape[1], shape[2], shape[3], shape[4], scale, type, pointer<const void>(bias)};
}

// (2, rows, heads, queries) by its address, 0 for none
dave::PeakAndShare peak_and_share(uintptr_t data, const std::vector<int64_t>& shape) {
  if (shape.size() != 5) throw std::invalid_argument("an attention shape has five sizes");
  if (!data) return {};
  auto* peak = pointer<float>(data);
  return {peak, peak + shape[0] * shape[3] * shape[1]};
}

void attention(const std::vector<int64_t>& shape, float scale, int dtype, uintptr_t bias, uintptr_t q,
               const std::vector<int64_t>& q_strides, uintptr_t k, const std::vector<int64_t>& k_strides, uintptr_t v,
               const std::vector<int64_t>& v_strides, uintptr_t out, uintptr_t kept, uintptr_t saved, int64_t saved_head,
               int threads) {
  dave::kernels().attention(attention_shape(shape, scale, dtype, bias), heads_of(q, q_strides), heads_of(k, k_strides),
                            heads_of(v, v_strides), pointer<void>(out), peak_and_share(kept, shape),
                            {pointer<uint32_t>(saved), saved_head}, threads);
}

void attention_vjp(const std::vector<int64_t>& shape, float scale, int dtype, uintptr_t bias, uintptr_t q,
                   const std::vector<int64_t>& q_strides, uintptr_t k, const std::vector<int64_t>& k_strides, uintptr_t kept,
                   uintptr_t saved, int64_t saved_head, uintptr_t d_out, const std::vector<int64_t>& d_out_strides,
                   uintptr_t d_v, int threads) {
  dave::kernels().attention_vjp(attention_shape(shape, scale, dtype, bias), heads_of(q, q_strides), heads_of(k, k_strides),
                                peak_and_share(kept, shape), {pointer<uint32_t>(saved), saved_head},
                                heads_of(d_out, d_out_strides), pointer<void>(d_v), threads);
}

void row_rstd(uintptr_t x, int dtype, int64_t rows, int64_t width, float eps, bool centred, uintptr_t rstd, int threads) {
  dave::kernels().row_rstd(pointer<const void>(x), dtype_of(dtype), rows, width, eps, centred, pointer<float>(rstd), threads);
}

void scale_rows(uintptr_t x, int dtype, uintptr_t scale, int64_t rows, int64_t width, uintptr_t y, int threads) {
  dave::kernels().scale_rows(pointer<const void>(x), dtype_of(dtype), pointer<const float>(scale), rows, width,
                             pointer<void>(y), threads);
}

void activate(uintptr_t u, int dtype, int activation, int gated, int64_t rows, int64_t hidden, uintptr_t h, uintptr_t gate,
              int threads) {
  if (activation < 0 || activation >= dave::activations || gated < 0 || gated > 2) throw std::invalid_argument("unknown activation");
  dave::kernels().activate(pointer<const void>(u), dtype_of(dtype), static_cast<dave::Activation>(activation),
                           static_cast<dave::Gated>(gated), rows, hidden, pointer<void>(h), pointer<void>(gate), threads);
}

void pack_linear(uintptr_t matrix, int64_t out, int64_t in, uintptr_t weights) {
  if (!dave::kernels().linear_panel) throw std::invalid_argument("this instruction set leaves linear to a library");
  if (out < 1 || in < 1) throw std::invalid_argument("linear needs an in-feature and an out-feature");
  dave::kernels().pack_linear(pointer<const float>(matrix), out, in, pointer<float>(weights));
}

// panel: what linear_panel was when the weights were packed; operands: bias, row_scale, gate, residual
void linear(uintptr_t x, int64_t rows, int64_t stride, int64_t in, uintptr_t weights, int64_t panel, int64_t out,
            const std::vector<uintptr_t>& operands, int activation, uintptr_t new_gate, uintptr_t y, int threads) {
  if (!panel || panel != dave::kernels().linear_panel)
    throw std::invalid_argument("the weights were packed for another instruction set");
  if (operands.size() != 4 || activation < -1 || activation >= dave::activations) throw std::invalid_argument("unknown epilogue");
  if (activation >= 0 && ((rows && !new_gate) || operands[2] || operands[3]))
    throw std::invalid_argument("an activation writes its gate, and goes with neither a gate nor a residual");
  const auto operand = [&](size_t i) { return pointer<const float>(operands[i]); };
  dave::kernels().linear(pointer<const float>(x), rows, stride, in, pointer<const float>(weights), out,
                         {operand(0), operand(1), operand(2), operand(3), activation, pointer<float>(new_gate)},
                         pointer<float>(y), threads);
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (int i = 0; dave::usable_isa(i); ++i) names.emplace_back(dave::usable_isa(i));
  return names;
}

void use_isa(const std::string& name) {
  if (dave::use_isa(name.c_str())) return;
  std::string names;
  for (const auto& usable : usable_isas()) names += (names.empty() ? "" : ", ") + usable;
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not in this machine; it has " + names);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "The host kernels of dave-fast. Addresses are taken as they are: call them through dave_fast.ops.";
  module.def("perturb", &perturb, release());
  module.def("pull_back", &pull_back, release());
  module.def("pull_back_mean", &pull_back_mean, release());
  module.def("normal", &normal, release());
  module.def("robust_mean", &robust_mean, release());
  module.def("smooth", &smooth, release());
  module.def("attention", &attention, release());
  module.def("attention_vjp", &attention_vjp, release());
  module.def("row_rstd", &row_rstd, release());
  module.def("scale_rows", &scale_rows, release());
  module.def("activate", &activate, release());
  module.def("linear_panel", [] { return dave::kernels().linear_panel; }, "Columns of a panel of linear's weights; 0 without a linear kernel.");
  module.def("pack_linear", &pack_linear, release());
  module.def("linear", &linear, release());
  module.def("multiplies_bfloat16", [] { return dave::kernels().multiplies_bfloat16; }, "Whether attention takes bfloat16.");
  module.def("isa", [] { return std::string(dave::kernels().isa); }, "The instruction set in use.");
  module.def("usable_isas", &usable_isas, "The instruction sets this machine can run, best first.");
  module.def("use_isa", &use_isa, "Take the kernels of one instruction set.");
}
