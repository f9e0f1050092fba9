#include "launch.cuh"
#include "pull_back.cuh"

namespace dave::cuda {
namespace {

template <typename T>
void pull_back_to(const Grid& grid, Values cotangents, const Inputs& inputs, Rows rows, Span span, Output to) {
  with_type(cotangents.dtype, [&](auto zero) {
    using Given = decltype(zero);
    grid.run(PullBack<T, Given>(static_cast<const Given*>(cotangents.data), inputs, rows, span, to));
  });
}

}  // namespace

void pull_back(const Queue& queue, Values cotangents, const Inputs& inputs, Rows rows, Span span, Output contributions) {
  if (inputs.images.dtype == Dtype::float64)
    pull_back_to<double>(Grid(queue), cotangents, inputs, rows, span, contributions);
  else pull_back_to<float>(Grid(queue), cotangents, inputs, rows, span, contributions);
}

void spread(const Queue& queue, Values densities, const Inputs& inputs, Rows rows, Span span, Output pulled) {
  if (inputs.images.dtype == Dtype::float64)
    Grid(queue).run(Spread<double>(static_cast<const double*>(densities.data), inputs, rows, span, pulled));
  else Grid(queue).run(Spread<float>(static_cast<const float*>(densities.data), inputs, rows, span, pulled));
}

}  // namespace dave::cuda
