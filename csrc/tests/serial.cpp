// The CUDA kernels' bodies on the host: cuda.h's entry points with a grid that runs block after block and thread after
// thread, with shared memory of exactly the declared size, so that tests and sanitizers check the indices of a GPU run.
#include <memory>

#include "cuda.h"
#include "perturb.cuh"
#include "pull_back.cuh"
#include "robust_mean.cuh"
#include "smooth.cuh"

namespace dave {
namespace {

struct SerialGrid {
  template <class Kernel>
  void run(const Kernel& kernel) const {
    if (kernel.blocks() >= int64_t{1} << 31) throw cuda::Error(std::string(kernel.name) + ": too many blocks");
    constexpr size_t size = Kernel::shared_bytes;
    for (int64_t block = 0; block < kernel.blocks(); ++block) {
      // new memory for each block, so that no block finds another one's values
      const std::unique_ptr<unsigned char[]> memory(new unsigned char[size]);
      __builtin_memset(memory.get(), 0xFF, size);
      kernel(DAVE_ISA::HostBlock{block, Kernel::threads, memory.get()});
    }
  }
};

}  // namespace

namespace cuda {

std::string why_not(int) { return ""; }

void perturb(const Queue&, const Images& images, const Draws& draws, Patch patch, void* tokens, Dtype stored) {
  DAVE_ISA::perturb_on(SerialGrid(), images, draws, patch, tokens, stored);
}

void pull_back(const Queue&, const void* cotangents, Dtype given, const Images& images, const Draws& draws, Rows rows,
               Patch patch, Span span, void* contributions, Dtype stored) {
  DAVE_ISA::pull_back_on(SerialGrid(), cotangents, given, images, draws, rows, patch, span, contributions, stored);
}

void robust_mean(const Queue&, const Contributions& contributions, const Placement& placement, void* raw) {
  DAVE_ISA::robust_mean_on(SerialGrid(), contributions, placement, raw);
}

void smooth(const Queue&, const Images& raw, void* scratch, void* maps) {
  DAVE_ISA::smooth_on(SerialGrid(), raw, scratch, maps);
}

}  // namespace cuda
}  // namespace dave
