#include "launch.cuh"
#include "shrink.cuh"

namespace dave::cuda {

void shrink(const Queue& queue, const Images& raw, const double* variance, void* shrunk) {
  if (raw.dtype == Dtype::float64) Grid(queue).run(Shrink<double>(raw, variance, shrunk));
  else Grid(queue).run(Shrink<float>(raw, variance, shrunk));
}

}  // namespace dave::cuda
