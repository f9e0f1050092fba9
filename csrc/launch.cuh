// The grid that the .cu files launch kernels on: a device's, which checks every return code, or, compiled by a C++ compiler,
// one that runs block after block and thread after thread on the host, for tests and sanitizers.
#pragma once

#include <memory>
#include <string>

#include "cuda.h"
#include "grid.h"

namespace dave::DAVE_ISA {

#ifdef __CUDACC__

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::resident) run_block(const __grid_constant__ Kernel kernel) {
  __shared__ __align__(16) unsigned char memory[Kernel::shared_bytes > 0 ? Kernel::shared_bytes : 1];
  kernel(DeviceBlock{memory});
}

class Grid {
 public:
  explicit Grid(const cuda::Queue& queue) : device_(queue.device), stream_(static_cast<cudaStream_t>(queue.stream)) {}

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

#else

struct Grid {
  explicit Grid(const cuda::Queue&) {}

  template <class Kernel>
  void run(const Kernel& kernel) const {
    for (int64_t block = 0; block < kernel.blocks(); ++block) {
      // new memory of exactly the declared size for each block, so that no block finds another one's values
      const std::unique_ptr<unsigned char[]> memory(new unsigned char[Kernel::shared_bytes]);
      __builtin_memset(memory.get(), 0xFF, Kernel::shared_bytes);
      kernel(HostBlock{block, Kernel::threads, memory.get()});
    }
  }
};

#endif

}  // namespace dave::DAVE_ISA

namespace dave::cuda {
using namespace DAVE_ISA;
}
