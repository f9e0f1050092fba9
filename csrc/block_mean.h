// robust_mean of one block of pixels on the host; the pixels are the lanes of vectors, and each value is read once.
#pragma once

#include "host.h"
#include "robust_mean.h"

namespace dave::DAVE_ISA {
namespace {

// Pixels that are sorted together: one or more vectors of every instruction set.
constexpr int lanes = 32;

// Pixels that are read together: pieces of each sample's row that are long enough for prefetching.
constexpr int64_t block_pixels = 8 * lanes;

template <typename T>
void sort_lanes(T* values, const Exchange* network, int64_t exchanges) {
  for (int64_t e = 0; e < exchanges; ++e) {
    T* low = values + network[e].low * lanes;
    T* high = values + network[e].high * lanes;
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const T a = low[l], b = high[l];
      low[l] = a < b ? a : b;
      high[l] = a > b ? a : b;
    }
  }
}

// mad from the sorted values (see robust_mean.h).
template <typename T>
void mad_of_sorted(const T* sorted, int64_t samples, const T* median, T* mad) {
  const int64_t half = (samples + 1) / 2;
  for (int l = 0; l < lanes; ++l) mad[l] = 0;
  for (int64_t i = 0; i < half; ++i) {
    const T* below = sorted + i * lanes;
    const T* above = sorted + (i + half) * lanes;
    const bool past_the_end = i + half >= samples;
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const T left = magnitude(sub(below[l], median[l]));
      const T right = past_the_end ? left : magnitude(sub(above[l], median[l]));
      const T nearer = right < left ? right : left;
      mad[l] = nearer > mad[l] ? nearer : mad[l];
    }
  }
}

template <typename T>
void mean_of_kept(const T* values, int64_t samples, const T* median, const T* mad, T* mean) {
  double total[lanes] = {}, carry[lanes] = {};
  T count[lanes] = {}, nans[lanes] = {}, within[lanes];
  for (int l = 0; l < lanes; ++l) within[l] = kept_within(mad[l]);
  for (int64_t s = 0; s < samples; ++s) {
    const T* row = values + s * lanes;
    T kept[lanes], addends[lanes];
    // four short loops, because a single one is compiled to branches instead of vectors
    for (int l = 0; l < lanes; ++l)
      kept[l] = magnitude(sub(row[l], median[l])) <= within[l] ? static_cast<T>(1) : static_cast<T>(0);
    for (int l = 0; l < lanes; ++l) addends[l] = kept[l] > 0 ? row[l] : static_cast<T>(0);
    for (int l = 0; l < lanes; ++l) {
      count[l] += kept[l];
      nans[l] += row[l] == row[l] ? static_cast<T>(0) : static_cast<T>(1);
    }
    for (int l = 0; l < lanes; ++l) {
      if constexpr (sizeof(T) == sizeof(double)) add_compensated(total[l], carry[l], addends[l]);
      else total[l] += static_cast<double>(addends[l]);
    }
  }
  for (int l = 0; l < lanes; ++l) {
    mean[l] = mean_of(median[l], nans[l] > 0, total[l], carry[l], static_cast<double>(count[l]));
  }
}

// One group of lanes, whose values are (samples, lanes); `sorted` is room for as many.
template <typename T>
void robust_mean_of(const T* values, int64_t samples, const Exchange* network, int64_t exchanges, T* sorted, T* mean) {
  T mad[lanes];
  copy_row(values, sorted, samples * lanes);
  sort_lanes(sorted, network, exchanges);
  const T* median = sorted + (samples - 1) / 2 * lanes;
  mad_of_sorted(sorted, samples, median, mad);
  mean_of_kept(values, samples, median, mad, mean);
}

// The sorting network of one number of samples, shared by the threads.
class Network {
 public:
  explicit Network(int64_t samples) : count_(exchanges_of(samples)), exchanges_(count_) {
    Exchange* to = exchanges_;
    sorting_network(samples, [&](int32_t low, int32_t high) { *to++ = {low, high}; });
  }
  const Exchange* exchanges() const { return exchanges_; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  Scratch<Exchange> exchanges_;
};

// The scratch memory of one thread: a block's values, a sorted group of lanes, and the block's means.
template <typename T>
struct BlockMean {
  Scratch<T> values, sorted, means;

  explicit BlockMean(int64_t samples)
      : values(samples * block_pixels), sorted(samples * lanes), means(block_pixels) {}

  // Means of `wanted` ≤ block_pixels pixels: the first one's first sample is element `first`, the next sample of each
  // `pixels` further.
  void run(Values contributions, int64_t first, int64_t pixels, int64_t samples, int64_t wanted,
           const Network& network) const {
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t x = 0; x < wanted; x += lanes) {
        T* row = values + (x * samples + s * lanes);
        const int64_t n = wanted - x < lanes ? wanted - x : lanes;
        load_row(contributions, first + s * pixels + x, row, n);
        for (int64_t l = n; l < lanes; ++l) row[l] = 0;
      }
    for (int64_t x = 0; x < wanted; x += lanes)
      robust_mean_of<T>(values + x * samples, samples, network.exchanges(), network.count(), sorted, means + x);
  }
};

}  // namespace
}  // namespace dave::DAVE_ISA
