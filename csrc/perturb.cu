#include "launch.cuh"
#include "perturb.cuh"

namespace dave::cuda {
namespace {

template <typename T>
void perturb_runs(const Grid& grid, const Inputs& inputs, Output tokens, int64_t run) {
  switch (run) {
    case 8: return grid.run(Perturb<T, 8>(inputs, tokens));
    case 4: return grid.run(Perturb<T, 4>(inputs, tokens));
    case 2: return grid.run(Perturb<T, 2>(inputs, tokens));
    default: return grid.run(Perturb<T, 1>(inputs, tokens));
  }
}

}  // namespace

void perturb(const Queue& queue, const Inputs& inputs, Output tokens) {
  // runs of 16 bytes where they divide the patches and are aligned, else the longest that do
  const int64_t size = tokens.dtype == Dtype::float64 ? 8 : tokens.dtype == Dtype::float32 ? 4 : 2;
  int64_t run = size == 2 ? 8 : 4;
  const auto at = reinterpret_cast<uintptr_t>(tokens.data);
  while (run > 1 && (inputs.patch.width % run || at % (run * size < 16 ? run * size : 16))) run /= 2;
  if (inputs.images.dtype == Dtype::float64) perturb_runs<double>(Grid(queue), inputs, tokens, run);
  else perturb_runs<float>(Grid(queue), inputs, tokens, run);
}

#ifdef __CUDACC__
// Looks up a kernel on the device, which fails where the build has no code for it.
std::string why_not(int device) {
  int count = 0;
  cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess && device >= count) return "there are " + std::to_string(count) + " devices";
  if (code == cudaSuccess) {
    try {
      const Device current(device);
      cudaFuncAttributes attributes;
      code = cudaFuncGetAttributes(&attributes, run_block<Perturb<float, 1>>);
    } catch (const Error& error) {
      return error.what();
    }
  }
  // clears the error, which the next launch would report otherwise
  cudaGetLastError();
  return code == cudaSuccess ? "" : std::string(cudaGetErrorName(code)) + ", " + cudaGetErrorString(code);
}
#else
std::string why_not(int) { return ""; }
#endif

}  // namespace dave::cuda
