#include "launch.cuh"
#include "robust_mean.cuh"

namespace dave::cuda {
namespace {

void means_of(const Grid& grid, const Contributions& of, const Placement& at, float* kept, float* raw) {
  if (of.samples <= 16) return grid.run(SortInOne<float, 16, 1>(of, at, kept, raw));
  if (of.samples <= 32) return grid.run(SortInOne<float, 32, 17>(of, at, kept, raw));
  if (of.samples <= 50) return grid.run(SortInOne<float, 50, 33>(of, at, kept, raw));
  if (of.samples <= 64) return grid.run(SortInOne<float, 64, 51>(of, at, kept, raw));
  if (of.samples <= 100) return grid.run(SortInOne<float, 100, 65>(of, at, kept, raw));
  if (of.samples <= 128) return grid.run(SortInTwo<float, 64, 101>(of, at, kept, raw));
  if (of.samples <= 256) return grid.run(SortInTwo<float, 128, 129>(of, at, kept, raw));
  if (of.values.dtype == Dtype::float32) return grid.run(Select<float, float>(of, at, kept, raw));
  if (of.values.dtype == Dtype::bfloat16) return grid.run(Select<float, bfloat16>(of, at, kept, raw));
  grid.run(Select<float, float16>(of, at, kept, raw));
}

// A double takes two registers: 64 or more a thread would spill.
void means_of(const Grid& grid, const Contributions& of, const Placement& at, double* kept, double* raw) {
  if (of.samples <= 16) return grid.run(SortInOne<double, 16, 1>(of, at, kept, raw));
  if (of.samples <= 50) return grid.run(SortInOne<double, 50, 17>(of, at, kept, raw));
  grid.run(Select<double, double>(of, at, kept, raw));
}

template <typename T>
void run(const Grid& grid, const Contributions& of, const Placement& at, void* scratch, Means to) {
  T *kept = to.variance ? static_cast<T*>(scratch) : nullptr, *raw = static_cast<T*>(to.raw);
  means_of(grid, {of.values, of.images, of.samples, 1, of.channels * of.pixels}, at, kept, raw);
  if (!to.variance) return;
  with_type(of.values.dtype, [&](auto zero) {
    using Given = decltype(zero);
    // doubles make doubles, and all others make floats
    if constexpr ((sizeof(Given) == sizeof(double)) == (sizeof(T) == sizeof(double)))
      grid.run(ChannelVariance<T, Given>(of, at, kept, raw, to.variance));
  });
}

}  // namespace

void robust_mean(const Queue& queue, const Contributions& contributions, const Placement& placement, void* scratch,
                 Means to) {
  if (contributions.values.dtype == Dtype::float64) run<double>(Grid(queue), contributions, placement, scratch, to);
  else run<float>(Grid(queue), contributions, placement, scratch, to);
}

}  // namespace dave::cuda
