// dave_fast._cuda: like dave_fast._native, with device pointers after the device's index and its stream.
#include "arguments.h"
#include "cuda.h"

namespace py = pybind11;
using dave::Dtype;

namespace {

dave::Images checked(dave::Images images) {
  if (images.channels * images.height * images.width >= int64_t{1} << 31)
    throw std::invalid_argument("an image must have fewer than 2^31 values");
  return images;
}

dave::Inputs checked(Address images, Dtype dtype, const Shape& shape, const DrawsFields& draws, int64_t rows, int64_t p_h,
                     int64_t p_w) {
  const auto inputs = inputs_of(images, dtype, shape, draws, rows, {p_h, p_w});
  checked(inputs.images);
  return inputs;
}

void perturb(int device, Address stream, Address images, Dtype dtype, const Shape& shape, const DrawsFields& draws,
             int64_t rows, int64_t p_h, int64_t p_w, Address tokens, Dtype stored) {
  dave::cuda::perturb({device, stream}, checked(images, dtype, shape, draws, rows, p_h, p_w), {tokens, stored});
}

void pull_back(int device, Address stream, Address cotangents, Dtype given, Address images, Dtype dtype,
               const Shape& shape, const DrawsFields& draws, int64_t rows, int64_t p_h, int64_t p_w, Address contributions,
               Dtype stored) {
  const auto inputs = checked(images, dtype, shape, draws, rows, p_h, p_w);
  dave::cuda::pull_back({device, stream}, {cotangents, given}, inputs, {0, rows}, {0, shape[2] * shape[3]},
                        {contributions, stored});
}

void robust_mean_variance(int device, Address stream, Address contributions, Dtype given, int64_t images, int64_t samples,
                          int64_t channels, int64_t pixels, Address scratch, Address raw, Address variance) {
  if (samples < 1 || channels < 1) throw std::invalid_argument("there must be a sample and a channel");
  if (pixels < 1 || images < 1) return;
  // a value's number in an image is divided as a 31-bit one
  if (pixels >= (int64_t{1} << 31) / channels || samples >= int64_t{1} << 31)
    throw std::invalid_argument("an image must have fewer than 2^31 values and samples");
  dave::cuda::robust_mean({device, stream}, {{contributions, given}, images, samples, channels, pixels},
                          {pixels, pixels, 0}, scratch, {raw, variance});
}

void robust_mean(int device, Address stream, Address contributions, Dtype given, int64_t images, int64_t samples,
                 int64_t pixels, Address raw) {
  robust_mean_variance(device, stream, contributions, given, images, samples, 1, pixels, {}, raw, {});
}

void pull_back_mean_variance(int device, Address stream, Address cotangents, Dtype given, Address images, Dtype dtype,
                             const Shape& shape, const DrawsFields& draws, int64_t rows, int64_t p_h, int64_t p_w,
                             int64_t samples, int64_t tile, Address scratch, Address raw, Address variance) {
  if (samples < 1 || rows % samples || tile < 1)
    throw std::invalid_argument("rows must be a multiple of the samples, and a tile have pixels");
  const auto inputs = checked(images, dtype, shape, draws, rows, p_h, p_w);
  dave::cuda::pull_back_mean({device, stream}, {cotangents, given}, inputs, samples, tile, scratch, {raw, variance});
}

void pull_back_mean(int device, Address stream, Address cotangents, Dtype given, Address images, Dtype dtype,
                    const Shape& shape, const DrawsFields& draws, int64_t rows, int64_t p_h, int64_t p_w, int64_t samples,
                    int64_t tile, Address scratch, Address raw) {
  pull_back_mean_variance(device, stream, cotangents, given, images, dtype, shape, draws, rows, p_h, p_w, samples, tile,
                          scratch, raw, {});
}

void spread_mean_variance(int device, Address stream, Address densities, Dtype dtype, int64_t length,
                          const DrawsFields& draws, int64_t rows, int64_t height, int64_t width, int64_t p_h, int64_t p_w,
                          int64_t samples, int64_t tile, Address scratch, Address mean, Address variance) {
  const auto inputs = sizes_of(length, dtype, height, width, draws, rows, {p_h, p_w}, samples);
  if (tile < 1) throw std::invalid_argument("a tile must have pixels");
  checked(inputs.images);
  dave::cuda::spread_mean({device, stream}, {densities, dtype}, inputs, samples, tile, scratch, {mean, variance});
}

void shrink(int device, Address stream, Address variance, Address raw, Dtype dtype, const Shape& shape, Address scratch,
            Address shrunk) {
  dave::cuda::shrink({device, stream}, variance, checked(images_of(raw, dtype, shape)), scratch, shrunk);
}

void smooth(int device, Address stream, Address raw, Dtype dtype, const Shape& shape, Address scratch, Address maps) {
  dave::cuda::smooth({device, stream}, checked(images_of(raw, dtype, shape)), scratch, maps);
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
  module.def("robust_mean_variance", &robust_mean_variance, release());
  module.def("pull_back_mean", &pull_back_mean, release());
  module.def("pull_back_mean_variance", &pull_back_mean_variance, release());
  module.def("spread_mean_variance", &spread_mean_variance, release());
  module.def("shrink", &shrink, release());
  module.def("smooth", &smooth, release());
}
