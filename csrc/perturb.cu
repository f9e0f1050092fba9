#include "launch.cuh"
#include "perturb.cuh"

namespace dave::cuda {

void perturb(const Queue& queue, const Images& images, const Draws& draws, Patch patch, void* tokens, Dtype stored) {
  DAVE_ISA::perturb_on(DAVE_ISA::DeviceGrid(queue), images, draws, patch, tokens, stored);
}

// A kernel of every device that the build is for tells whether this one is among them.
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
  // the error has been told: it must not be the next launch's
  cudaGetLastError();
  return code == cudaSuccess ? "" : std::string(cudaGetErrorName(code)) + ", " + cudaGetErrorString(code);
}

}  // namespace dave::cuda
