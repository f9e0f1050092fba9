#include "launch.cuh"
#include "shrink.cuh"

namespace dave::cuda {
namespace {

template <typename T>
void shrink_typed(const Grid& grid, const double* variance, const Images& raw, double* scratch, void* shrunk) {
  grid.run(Detail<T>(raw, scratch));
  grid.run(Shrink<T>(raw, scratch, variance, shrunk));
}

}  // namespace

void shrink(const Queue& queue, const double* variance, const Images& raw, double* scratch, void* shrunk) {
  if (raw.dtype == Dtype::float64) shrink_typed<double>(Grid(queue), variance, raw, scratch, shrunk);
  else shrink_typed<float>(Grid(queue), variance, raw, scratch, shrunk);
}

}  // namespace dave::cuda
