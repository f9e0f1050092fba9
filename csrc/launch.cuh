// The grid of a CUDA device: launches a kernel's blocks on a stream and checks every return code.
#pragma once

#include <string>

#include "cuda.h"
#include "grid.h"

namespace dave::DAVE_ISA {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::resident) run_block(const __grid_constant__ Kernel kernel) {
  __shared__ __align__(16) unsigned char memory[Kernel::shared_bytes > 0 ? Kernel::shared_bytes : 1];
  kernel(DeviceBlock{memory});
}

class DeviceGrid {
 public:
  explicit DeviceGrid(const cuda::Queue& queue) : device_(queue.device), stream_(static_cast<cudaStream_t>(queue.stream)) {}

  template <class Kernel>
  void run(const Kernel& kernel) const {
    const int64_t blocks = kernel.blocks();
    if (blocks == 0) return;
    const std::string what = std::string(kernel.name) + " in " + std::to_string(blocks) + " blocks of " +
                             std::to_string(Kernel::threads) + " threads";
    if (blocks >= int64_t{1} << 31) throw cuda::Error(what + ": a grid has fewer than 2^31 blocks; give fewer rows at once");
    run_block<<<static_cast<unsigned>(blocks), Kernel::threads, 0, stream_>>>(kernel);
    cuda::require(cudaGetLastError(), what);
  }

 private:
  cuda::Device device_;
  cudaStream_t stream_;
};

}  // namespace dave::DAVE_ISA
