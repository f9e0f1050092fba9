#include "launch.cuh"
#include "robust_mean.cuh"

namespace dave::cuda {

void robust_mean(const Queue& queue, const Contributions& contributions, const Placement& placement, void* raw) {
  DAVE_ISA::robust_mean_on(DAVE_ISA::DeviceGrid(queue), contributions, placement, raw);
}

}  // namespace dave::cuda
