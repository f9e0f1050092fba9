#include "launch.cuh"
#include "pull_back.cuh"

namespace dave::cuda {

void pull_back(const Queue& queue, const void* cotangents, Dtype given, const Images& images, const Draws& draws,
               Rows rows, Patch patch, Span span, void* contributions, Dtype stored) {
  DAVE_ISA::pull_back_on(DAVE_ISA::DeviceGrid(queue), cotangents, given, images, draws, rows, patch, span, contributions,
                         stored);
}

}  // namespace dave::cuda
