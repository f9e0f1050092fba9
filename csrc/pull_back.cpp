// Host driver of pull_back: as many draws at a time as there are threads; first their cotangents are un-patchified into
// zero-padded images, then every thread gathers image rows.
#include "pull_back.h"

#include "host.h"
#include "ops.h"

namespace dave::DAVE_ISA {
namespace {

// One draw's warp as the gather needs it.
template <typename T>
struct Gather {
  Affine<T> map, inverse;
  T reach_x, reach_y;
  int32_t candidates_x, candidates_y;

  Gather(const double* matrix, const Inverse& inverted, int32_t height, int32_t width)
      : map(matrix), inverse(inverted.matrix), reach_x(static_cast<T>(inverted.reach_x)),
        reach_y(static_cast<T>(inverted.reach_y)), candidates_x(candidates(inverted.reach_x, width)),
        candidates_y(candidates(inverted.reach_y, height)) {}
};

// The arrays of one source row, pixels as the lanes of vectors.
template <typename T>
struct GatherRow {
  Scratch<T> first_x, first_y, weight, pulled;
  Scratch<int32_t> first;

  GatherRow(int64_t width, int64_t channels)
      : first_x(width), first_y(width), weight(width), pulled(channels * width), first(width) {}

  void locate(const Gather<T>& g, T qy, int32_t height, int32_t width, int32_t stride) {
#pragma omp simd
    for (int32_t x = 0; x < width; ++x) {
      const T qx = static_cast<T>(x);
      const int32_t px = first_candidate(g.inverse.x(qx, qy), g.reach_x, width);
      const int32_t py = first_candidate(g.inverse.y(qx, qy), g.reach_y, height);
      first_x[x] = static_cast<T>(px), first_y[x] = static_cast<T>(py);
      first[x] = py * stride + px;
    }
  }

  void weigh(const Gather<T>& g, int32_t i, int32_t j, T qy, int32_t width) {
#pragma omp simd
    for (int32_t x = 0; x < width; ++x)
      weight[x] = tap_weight(g.map, first_x[x] + static_cast<T>(i), first_y[x] + static_cast<T>(j),
                             static_cast<T>(x), qy);
  }

  void gather(const T* tap, T* sums, int32_t width) const {
#pragma omp simd
    for (int32_t x = 0; x < width; ++x) sums[x] = add(sums[x], mul(weight[x], tap[first[x]]));
  }
};

template <typename T>
class Job {
 public:
  Job(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch, void* contributions,
      Dtype stored, int threads)
      : cotangents_(cotangents), given_(given), images_(images), draws_(draws), patch_(patch),
        contributions_(contributions), stored_(stored), threads_(threads),
        height_(static_cast<int32_t>(images.height)), width_(static_cast<int32_t>(images.width)) {
    int32_t pad_x = 0, pad_y = 0;
    for (int64_t r = 0; r < draws.rows; ++r) {
      const Inverse inverse(draws.matrices + 6 * r);
      const int32_t x = candidates(inverse.reach_x, width_), y = candidates(inverse.reach_y, height_);
      pad_x = x > pad_x ? x : pad_x, pad_y = y > pad_y ? y : pad_y;
    }
    stride_ = width_ + pad_x;
    padded_rows_ = height_ + pad_y;
  }

  void run() const {
    const int64_t planes = images_.channels * padded_rows_;
    const int64_t group = threads_ < draws_.rows ? threads_ : draws_.rows;
    const Scratch<T> padded(group * planes * stride_);
    const PerThread<GatherRow<T>> rows(threads_, images_.width, images_.channels);
#pragma omp parallel num_threads(threads_)
    {
      GatherRow<T>& row = rows.mine();
      for (int64_t start = 0; start < draws_.rows; start += group) {
        const int64_t count = draws_.rows - start < group ? draws_.rows - start : group;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * planes; ++i) unpatchify_row(start + i / planes, i % planes, padded + i * stride_);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * height_; ++i)
          pull_row(start + i / height_, i % height_, padded + i / height_ * planes * stride_, row);
      }
    }
  }

 private:
  void unpatchify_row(int64_t r, int64_t plane_row, T* to) const {
    const int64_t c = plane_row / padded_rows_, y = plane_row % padded_rows_;
    const int64_t filled = y < height_ ? width_ : 0;
    for (int64_t x = filled; x < stride_; ++x) to[x] = 0;
    if (!filled) return;
    const TokenRow from(images_, patch_, r, c, y);
    for (int64_t x = 0; x < width_; x += patch_.width)
      load_row(cotangents_, given_, from.first + x / patch_.width * from.step, to + x, patch_.width);
  }

  void pull_row(int64_t r, int64_t y, const T* padded, GatherRow<T>& row) const {
    const double* matrix = draws_.matrices + 6 * r;
    const Gather<T> g(matrix, Inverse(matrix), height_, width_);
    const T qy = static_cast<T>(y), signal = static_cast<T>(draws_.signal[r]);
    const int64_t plane = static_cast<int64_t>(padded_rows_) * stride_;
    row.locate(g, qy, height_, width_, stride_);
    for (int64_t x = 0; x < images_.channels * width_; ++x) row.pulled[x] = 0;
    for (int32_t j = 0; j < g.candidates_y; ++j)
      for (int32_t i = 0; i < g.candidates_x; ++i) {
        row.weigh(g, i, j, qy, width_);
        for (int64_t c = 0; c < images_.channels; ++c)
          row.gather(padded + c * plane + j * stride_ + i, row.pulled + c * width_, width_);
      }
    for (int64_t c = 0; c < images_.channels; ++c) {
      const int64_t at = (c * height_ + y) * width_, size = images_.channels * height_ * width_;
      const T* image = static_cast<const T*>(images_.data) + draws_.image_index[r] * size + at;
      T* pulled = row.pulled + c * width_;
      for (int32_t x = 0; x < width_; ++x) pulled[x] = mul(mul(signal, pulled[x]), image[x]);
      store_row<T>(pulled, contributions_, stored_, r * size + at, width_);
    }
  }

  const void* cotangents_;
  Dtype given_;
  const Images& images_;
  const Draws& draws_;
  Patch patch_;
  void* contributions_;
  Dtype stored_;
  int threads_;
  int32_t height_, width_, stride_, padded_rows_;
};

}  // namespace

void pull_back(const void* cotangents, Dtype given, const Images& images, const Draws& draws, Patch patch,
               void* contributions, Dtype stored, int threads) {
  if (draws.rows == 0) return;
  if (images.dtype == Dtype::float64)
    return Job<double>(cotangents, given, images, draws, patch, contributions, stored, threads).run();
  Job<float>(cotangents, given, images, draws, patch, contributions, stored, threads).run();
}

}  // namespace dave::DAVE_ISA
