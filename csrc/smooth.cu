#include "launch.cuh"
#include "smooth.cuh"

namespace dave::cuda {
namespace {

template <typename T>
void smooth_typed(const Grid& grid, const Images& raw, void* scratch, void* maps) {
  const SmoothArguments<T> arguments(raw, scratch, maps);
  grid.run(Blend<T>(arguments));
  grid.run(Bilateral<T>(arguments));
  grid.run(Normalise<T>(arguments));
}

}  // namespace

void smooth(const Queue& queue, const Images& raw, void* scratch, void* maps) {
  if (raw.dtype == Dtype::float64) smooth_typed<double>(Grid(queue), raw, scratch, maps);
  else smooth_typed<float>(Grid(queue), raw, scratch, maps);
}

}  // namespace dave::cuda
