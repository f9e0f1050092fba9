// dave_fast._cuda: like dave_fast._native, with tensors of a device after its index and its stream. What draws hold the
// host does not read: kernels find indices outside of the batch, and no matrix makes them read outside of the images.
#include "arguments.h"
#include "cuda.h"

namespace py = pybind11;

namespace {

// The address of a cudaStream_t.
using Stream = uintptr_t;

dave::cuda::Queue queue_of(int device, Stream stream) { return {device, reinterpret_cast<void*>(stream)}; }

dave::Images checked(dave::Images images) {
  expect(images.channels * images.height * images.width < int64_t{1} << 31, "an image must have fewer than 2^31 values");
  return images;
}

dave::Inputs checked(const Array& images, const Shape& shape, const DrawsFields& draws, int64_t p_h, int64_t p_w) {
  return inputs_of(checked(images_of(images, shape)), draws, p_h, p_w);
}

// The scratch memory of a mean by tiles.
void* scratch_of(const Array& scratch, const dave::Images& images, int64_t samples, int64_t tile, bool variance) {
  expect(tile >= 1 && tile <= images.height * images.width, "a tile must have pixels of the image");
  const int64_t length = count_of({samples + (variance ? 2 : 0), images.channels, tile});
  return result_of(scratch, length, images.dtype, "scratch");
}

void perturb(int device, Stream stream, const Array& images, const Shape& shape, const DrawsFields& draws, int64_t p_h,
             int64_t p_w, const Array& tokens) {
  const auto inputs = checked(images, shape, draws, p_h, p_w);
  const dave::Output to = output_of(tokens, values_of_rows(inputs), "tokens");
  expect_apart(tokens, {images});
  dave::cuda::perturb(queue_of(device, stream), inputs, to);
}

void pull_back(int device, Stream stream, const Array& cotangents, const Array& images, const Shape& shape,
               const DrawsFields& draws, int64_t p_h, int64_t p_w, const Array& contributions) {
  const auto inputs = checked(images, shape, draws, p_h, p_w);
  const int64_t length = values_of_rows(inputs);
  const dave::Values from = values_of(cotangents, length, "cotangents");
  const dave::Output to = output_of(contributions, length, "contributions");
  expect_apart(contributions, {cotangents, images});
  dave::cuda::pull_back(queue_of(device, stream), from, inputs, {0, inputs.draws.rows}, {0, shape[2] * shape[3]}, to);
}

void robust_mean_to(int device, Stream stream, const Array& contributions, int64_t images, int64_t samples,
                    int64_t channels, int64_t pixels, const Optional& scratch, const Array& raw, const Optional& variance) {
  const auto from = contributions_of(contributions, images, samples, channels, pixels);
  const dave::Dtype dtype = statistics_of(from.values.dtype);
  const dave::Means to = means_of(raw, variance, dtype, images, channels, pixels);
  void* const room = scratch ? result_of(*scratch, 2 * images * channels * pixels, dtype, "scratch") : nullptr;
  expect_apart(raw, {contributions});
  if (pixels < 1 || images < 1) return;
  // a value's number in an image is divided as a 31-bit one
  expect(pixels < (int64_t{1} << 31) / channels, "an image must have fewer than 2^31 values");
  dave::cuda::robust_mean(queue_of(device, stream), from, {pixels, pixels, 0}, room, to);
}

void robust_mean_variance(int device, Stream stream, const Array& contributions, int64_t images, int64_t samples,
                          int64_t channels, int64_t pixels, const Array& scratch, const Array& raw,
                          const Array& variance) {
  robust_mean_to(device, stream, contributions, images, samples, channels, pixels, scratch, raw, variance);
}

void robust_mean(int device, Stream stream, const Array& contributions, int64_t images, int64_t samples, int64_t pixels,
                 const Array& raw) {
  robust_mean_to(device, stream, contributions, images, samples, 1, pixels, {}, raw, {});
}

void pull_back_mean_variance(int device, Stream stream, const Array& cotangents, const Array& images, const Shape& shape,
                             const DrawsFields& draws, int64_t p_h, int64_t p_w, int64_t samples, int64_t tile,
                             const Array& scratch, const Array& raw, const Optional& variance) {
  const auto inputs = checked(images, shape, draws, p_h, p_w);
  const int64_t groups = groups_of(inputs.draws.rows, samples);
  const dave::Values from = values_of(cotangents, values_of_rows(inputs), "cotangents");
  const dave::Means to = means_of(raw, variance, inputs.images.dtype, groups, shape[1], shape[2] * shape[3]);
  void* const room = scratch_of(scratch, inputs.images, samples, tile, variance.has_value());
  expect_apart(raw, {cotangents, images, scratch});
  dave::cuda::pull_back_mean(queue_of(device, stream), from, inputs, samples, tile, room, to);
}

void pull_back_mean(int device, Stream stream, const Array& cotangents, const Array& images, const Shape& shape,
                    const DrawsFields& draws, int64_t p_h, int64_t p_w, int64_t samples, int64_t tile,
                    const Array& scratch, const Array& raw) {
  pull_back_mean_variance(device, stream, cotangents, images, shape, draws, p_h, p_w, samples, tile, scratch, raw, {});
}

void spread_mean_variance(int device, Stream stream, const Array& densities, const DrawsFields& draws, int64_t height,
                          int64_t width, int64_t p_h, int64_t p_w, int64_t samples, int64_t tile, const Array& scratch,
                          const Array& mean, const Array& variance) {
  const auto inputs = map_inputs_of(densities, draws, height, width, p_h, p_w, samples);
  checked(inputs.images);
  const dave::Values from = values_of(densities, patches_of_rows(inputs), "densities");
  const dave::Means to = means_of(mean, variance, inputs.images.dtype, inputs.images.count, 1, height * width, "mean");
  void* const room = scratch_of(scratch, inputs.images, samples, tile, true);
  expect_apart(mean, {densities, scratch});
  dave::cuda::spread_mean(queue_of(device, stream), from, inputs, samples, tile, room, to);
}

void shrink(int device, Stream stream, const Array& variance, const Array& raw, const Shape& shape, const Array& scratch,
            const Array& shrunk) {
  const dave::Images images = checked(images_of(raw, shape, "raw"));
  const int64_t length = images.count * images.height * images.width;
  const auto* spread = memory_of<double>(variance, length, "variance");
  auto* const room = memory_of<double>(scratch, 2 * length, "scratch");
  void* const to = result_of(shrunk, length, images.dtype, "shrunk");
  expect_apart(shrunk, {variance, raw, scratch});
  dave::cuda::shrink(queue_of(device, stream), spread, images, room, to);
}

void smooth(int device, Stream stream, const Array& raw, const Shape& shape, const Array& scratch, const Array& maps) {
  const dave::Images images = checked(images_of(raw, shape, "raw"));
  const int64_t pixels = images.height * images.width;
  void* const room = result_of(scratch, images.count * (pixels + 1), images.dtype, "scratch");
  void* const to = result_of(maps, images.count * pixels, images.dtype, "maps");
  expect_apart(maps, {raw, scratch});
  dave::cuda::smooth(queue_of(device, stream), images, room, to);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "The CUDA kernels of dave-fast. Tensors are as those of dave_fast._native: call them through dave_fast.ops.";
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
