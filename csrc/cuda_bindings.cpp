// dave_fast._cuda: like dave_fast._native, with device pointers after the device's index and its stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "cuda.h"

namespace py = pybind11;
using dave::cuda::Queue;

namespace {

Queue queue_of(int device, uintptr_t stream) { return {device, pointer<void>(stream)}; }

dave::Images checked(uintptr_t images, int dtype, const std::vector<int64_t>& shape, dave::Patch patch) {
  const auto images_ = images_of(images, dtype, shape);
  check_shapes(images_, patch);
  if (images_.dtype != dave::Dtype::float32 && images_.dtype != dave::Dtype::float64)
    throw std::invalid_argument("images must be float32 or float64");
  if (images_.channels * images_.height * images_.width >= int64_t{1} << 31)
    throw std::invalid_argument("an image must have fewer than 2^31 values");
  return images_;
}

void perturb(int device, uintptr_t stream, uintptr_t images, int dtype, const std::vector<int64_t>& shape,
             const std::vector<uintptr_t>& draws, int64_t rows, int64_t p_h, int64_t p_w, uintptr_t tokens, int stored) {
  dave::cuda::perturb(queue_of(device, stream), checked(images, dtype, shape, {p_h, p_w}), draws_of(draws, rows),
                      {p_h, p_w}, pointer<void>(tokens), stored_dtype(stored));
}

void pull_back(int device, uintptr_t stream, uintptr_t cotangents, int given, uintptr_t images, int dtype,
               const std::vector<int64_t>& shape, const std::vector<uintptr_t>& draws, int64_t rows, int64_t p_h,
               int64_t p_w, uintptr_t contributions, int stored) {
  const auto images_ = checked(images, dtype, shape, {p_h, p_w});
  dave::cuda::pull_back(queue_of(device, stream), pointer<const void>(cotangents), stored_dtype(given), images_,
                        draws_of(draws, rows), {0, rows}, {p_h, p_w}, {0, images_.height * images_.width},
                        pointer<void>(contributions), stored_dtype(stored));
}

void robust_mean(int device, uintptr_t stream, uintptr_t contributions, int given, int64_t images, int64_t samples,
                 int64_t pixels, uintptr_t raw) {
  if (samples < 1) throw std::invalid_argument("there must be a sample");
  if (pixels < 1 || images < 1) return;
  // a pixel's number is divided as a 31-bit one
  if (pixels >= int64_t{1} << 31 || samples >= int64_t{1} << 31)
    throw std::invalid_argument("an image must have fewer than 2^31 pixels and samples");
  dave::cuda::robust_mean(queue_of(device, stream),
                          {pointer<const void>(contributions), stored_dtype(given), images, samples, pixels},
                          {pixels, 0, 0}, pointer<void>(raw));
}

void pull_back_mean(int device, uintptr_t stream, uintptr_t cotangents, int given, uintptr_t images, int dtype,
                    const std::vector<int64_t>& shape, const std::vector<uintptr_t>& draws, int64_t rows, int64_t p_h,
                    int64_t p_w, int64_t samples, int64_t tile, uintptr_t scratch, uintptr_t raw) {
  if (samples < 1 || rows % samples || tile < 1)
    throw std::invalid_argument("rows must be a multiple of the samples, and a tile have pixels");
  dave::cuda::pull_back_mean(queue_of(device, stream), pointer<const void>(cotangents), stored_dtype(given),
                             checked(images, dtype, shape, {p_h, p_w}), draws_of(draws, rows), {p_h, p_w}, samples, tile,
                             pointer<void>(scratch), pointer<void>(raw));
}

void smooth(int device, uintptr_t stream, uintptr_t raw, int dtype, const std::vector<int64_t>& shape, uintptr_t scratch,
            uintptr_t maps) {
  dave::cuda::smooth(queue_of(device, stream), checked(raw, dtype, shape, {1, 1}), pointer<void>(scratch),
                     pointer<void>(maps));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "The CUDA kernels of dave-fast. Addresses are taken as they are: call them through dave_fast.ops.";
  py::register_exception<dave::cuda::Error>(module, "Error", PyExc_RuntimeError);
  module.def("why_not", &dave::cuda::why_not, "Why kernels cannot run on a device; empty where they can.");
  module.def("perturb", &perturb, release());
  module.def("pull_back", &pull_back, release());
  module.def("robust_mean", &robust_mean, release());
  module.def("pull_back_mean", &pull_back_mean, release());
  module.def("smooth", &smooth, release());
}
