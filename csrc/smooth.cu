#include "launch.cuh"
#include "smooth.cuh"

namespace dave::cuda {

void smooth(const Queue& queue, const Images& raw, void* scratch, void* maps) {
  DAVE_ISA::smooth_on(DAVE_ISA::DeviceGrid(queue), raw, scratch, maps);
}

}  // namespace dave::cuda
