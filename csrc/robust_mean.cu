#include "launch.cuh"
#include "robust_mean.cuh"

namespace dave::cuda {
namespace {

void mean_of_floats(const Grid& grid, const Contributions& of, const Placement& at, void* raw) {
  if (of.samples <= 16) return grid.run(SortInOne<float, 16, 1>(of, at, raw));
  if (of.samples <= 32) return grid.run(SortInOne<float, 32, 17>(of, at, raw));
  if (of.samples <= 50) return grid.run(SortInOne<float, 50, 33>(of, at, raw));
  if (of.samples <= 64) return grid.run(SortInOne<float, 64, 51>(of, at, raw));
  if (of.samples <= 100) return grid.run(SortInOne<float, 100, 65>(of, at, raw));
  if (of.samples <= 128) return grid.run(SortInTwo<float, 64, 101>(of, at, raw));
  if (of.samples <= 256) return grid.run(SortInTwo<float, 128, 129>(of, at, raw));
  if (of.values.dtype == Dtype::float32) return grid.run(Select<float, float>(of, at, raw));
  if (of.values.dtype == Dtype::bfloat16) return grid.run(Select<float, bfloat16>(of, at, raw));
  grid.run(Select<float, float16>(of, at, raw));
}

// A double takes two registers: 64 or more a thread would spill.
void mean_of_doubles(const Grid& grid, const Contributions& of, const Placement& at, void* raw) {
  if (of.samples <= 16) return grid.run(SortInOne<double, 16, 1>(of, at, raw));
  if (of.samples <= 50) return grid.run(SortInOne<double, 50, 17>(of, at, raw));
  grid.run(Select<double, double>(of, at, raw));
}

}  // namespace

void robust_mean(const Queue& queue, const Contributions& contributions, const Placement& placement, void* raw) {
  if (contributions.values.dtype == Dtype::float64) mean_of_doubles(Grid(queue), contributions, placement, raw);
  else mean_of_floats(Grid(queue), contributions, placement, raw);
}

}  // namespace dave::cuda
