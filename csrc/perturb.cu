#include "launch.cuh"
#include "perturb.cuh"

namespace dave::cuda {

void perturb(const Queue& queue, const Images& images, const Draws& draws, Patch patch, void* tokens, Dtype stored) {
  DAVE_ISA::perturb_on(DAVE_ISA::DeviceGrid(queue), images, draws, patch, tokens, stored);
}

// Looks up a kernel on the device, which fails where the build has no code for it.
std::string why_not(int device) {
  int count = 0;
  cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess && device >= count) return "there are " + std::to_string(count) + " devices";
  if (code == cudaSuccess) {
    try {
      const Device current(device);
      cudaFuncAttributes attributes;
      code = cudaFuncGetAttributes(&attributes, DAVE_ISA::run_block<DAVE_ISA::Perturb<float, 1>>);
    } catch (const Error& error) {
      return error.what();
    }
  }
  // clears the error, which the next launch would report otherwise
  cudaGetLastError();
  return code == cudaSuccess ? "" : std::string(cudaGetErrorName(code)) + ", " + cudaGetErrorString(code);
}

}  // namespace dave::cuda
