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

// Adds the deviations of a channel's kept values from their mean to `sums` (samples, lanes), and how many are kept, or NaN
// where the mean is NaN, to `counts`.
template <typename T>
void add_deviations(const T* values, int64_t samples, const T* median, const T* mad, const T* mean, T* sums, T* counts) {
  T within[lanes];
  for (int l = 0; l < lanes; ++l) {
    within[l] = kept_within(mad[l]);
    counts[l] += mean[l] == mean[l] ? static_cast<T>(0) : mean[l];
  }
  for (int64_t s = 0; s < samples; ++s) {
    const T* row = values + s * lanes;
    T* sum = sums + s * lanes;
    T kept[lanes];
    for (int l = 0; l < lanes; ++l)
      kept[l] = magnitude(sub(row[l], median[l])) <= within[l] ? static_cast<T>(1) : static_cast<T>(0);
    for (int l = 0; l < lanes; ++l) {
      sum[l] = add(sum[l], deviation(row[l], mean[l], kept[l] > 0));
      counts[l] += kept[l];
    }
  }
}

template <typename T>
void variance_of_lanes(const T* sums, const T* counts, int64_t samples, int64_t channels, double* variance) {
  double squares[lanes] = {};
  for (int64_t s = 0; s < samples; ++s)
    for (int l = 0; l < lanes; ++l) squares[l] = add_square(squares[l], sums[s * lanes + l]);
  for (int l = 0; l < lanes; ++l) variance[l] = variance_of(squares[l], static_cast<double>(counts[l]), channels);
}

// The deviations of a block's samples, summed over its channels, and its variances: the scratch memory of one thread.
template <typename T>
struct BlockVariance {
  int64_t samples;
  Scratch<T> sums, counts;
  Scratch<double> variances;

  explicit BlockVariance(int64_t samples_)
      : samples(samples_), sums(samples * block_pixels), counts(block_pixels), variances(block_pixels) {}

  void clear() const {
    for (int64_t i = 0; i < samples * block_pixels; ++i) sums[i] = 0;
    for (int64_t i = 0; i < block_pixels; ++i) counts[i] = 0;
  }
  // After all channels have been added, the variances of the first `wanted` pixels.
  void finish(int64_t channels, int64_t wanted) const {
    for (int64_t x = 0; x < wanted; x += lanes)
      variance_of_lanes<T>(sums + x * samples, counts + x, samples, channels, variances + x);
  }
};

// One group of lanes, whose values are (samples, lanes); `sorted` is room for as many, `mad` for one.
template <typename T>
void robust_mean_of(const T* values, int64_t samples, const Exchange* network, int64_t exchanges, T* sorted, T* mad,
                    T* mean) {
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
  // `pixels` further. Their deviations are added to `variance` unless it is null.
  void run(Values contributions, int64_t first, int64_t pixels, int64_t samples, int64_t wanted, const Network& network,
           const BlockVariance<T>* variance) const {
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t x = 0; x < wanted; x += lanes) {
        T* row = values + (x * samples + s * lanes);
        const int64_t n = wanted - x < lanes ? wanted - x : lanes;
        load_row(contributions, first + s * pixels + x, row, n);
        for (int64_t l = n; l < lanes; ++l) row[l] = 0;
      }
    for (int64_t x = 0; x < wanted; x += lanes) {
      T mad[lanes];
      const T* group = values + x * samples;
      robust_mean_of<T>(group, samples, network.exchanges(), network.count(), sorted, mad, means + x);
      if (!variance) continue;
      const T* median = sorted + (samples - 1) / 2 * lanes;
      add_deviations<T>(group, samples, median, mad, means + x, variance->sums + x * samples, variance->counts + x);
    }
  }
};

}  // namespace
}  // namespace dave::DAVE_ISA
