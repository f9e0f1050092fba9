// robust_mean on a GPU: the S values of a pixel are sorted in registers, by one thread or by two.
//
// The network is a list of compare-exchanges known at compile time, unrolled, so that all values stay in registers. Values
// are read twice: to be sorted, and, from the caches, to be summed in the order of the samples. A network of P values
// sorts any S ≤ P: it is padded with infinities on both sides, so that the median's index is known at compile time. For
// more samples than the largest network the median is selected bit by bit.
//
// The variance is a kernel of its own, one thread a pixel, which reads the values a third time, from the caches: sorting
// needs all registers for one channel, while a deviation is summed over the channels before it is squared. What decided
// which values are kept, two numbers a mean, is stored in between.
#pragma once

#include <utility>

#include "cuda.h"
#include "grid.h"
#include "robust_mean.h"

namespace dave::DAVE_ISA {

using cuda::Placement;

template <int n>
struct NetworkOf {
  static constexpr int count = static_cast<int>(exchanges_of(n));
  Exchange exchanges[count > 0 ? count : 1] = {};
  constexpr NetworkOf() {
    int e = 0;
    sorting_network(n, [&](int32_t low, int32_t high) { exchanges[e++] = {low, high}; });
  }
};

template <int n>
constexpr NetworkOf<n> network{};

template <int low, int high, typename T>
DAVE_DEVICE void exchange(T* values) {
  const T a = values[low], b = values[high];
  values[low] = smaller_of(a, b);
  values[high] = larger_of(a, b);
}

template <int n, int first, typename T, size_t... e>
DAVE_DEVICE void exchanges(T* values, std::index_sequence<e...>) {
  (exchange<network<n>.exchanges[first + e].low, network<n>.exchanges[first + e].high>(values), ...);
}

template <int n, int first = 0, typename T>
DAVE_DEVICE void sort(T* values) {
  // in pieces, since compilers limit the length of an expression
  constexpr int left = NetworkOf<n>::count - first, piece = left < 64 ? left : 64;
  if constexpr (piece > 0) {
    exchanges<n, first>(values, std::make_index_sequence<piece>{});
    sort<n, first + piece>(values);
  }
}

// Sorts a bitonic sequence whose length is a power of two.
template <int n, typename T>
DAVE_DEVICE void sort_bitonic(T* values) {
  if constexpr (n > 1) {
    DAVE_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      const T a = values[i], b = values[i + n / 2];
      values[i] = smaller_of(a, b);
      values[i + n / 2] = larger_of(a, b);
    }
    sort_bitonic<n / 2>(values);
    sort_bitonic<n / 2>(values + n / 2);
  }
}

// values[i] = values[i + by] in the first n, the last of them repeated; by ≤ most.
template <int n, int most, typename T>
DAVE_DEVICE void shift_down(T* values, int by) {
  DAVE_UNROLL
  for (int step = 1; step <= most; step *= 2)
    if (by & step) {
      DAVE_UNROLL
      for (int i = 0; i < n; ++i) values[i] = values[i + step < n ? i + step : n - 1];
    }
}

template <typename T>
struct RobustMeanArguments {
  Contributions of;
  Placement placement;
  T* raw;
  // the medians, then the thresholds of all means; null where the variance is not wanted
  T* statistics;
  Divider span, blocks_an_image;

  RobustMeanArguments(const Contributions& contributions, const Placement& at, T* kept, T* to, int pixels_a_block)
      : of(contributions), placement(at), raw(to), statistics(kept), span(at.span),
        blocks_an_image(blocks_of(contributions.pixels, pixels_a_block)) {}

  int64_t blocks() const { return of.images * blocks_an_image.divisor; }
  DAVE_DEVICE int64_t element(uint32_t image, uint32_t pixel) const {
    return static_cast<int64_t>(image) * of.samples * of.pixels + pixel;
  }
  DAVE_DEVICE T* mean(uint32_t image, uint32_t pixel) const {
    uint32_t x = pixel;
    const uint32_t plane = span.split(x);
    return raw + (placement.offset + image * of.pixels + plane * placement.plane + x);
  }

  // Calls f(image, pixel) for the pixels of a block, one a thread.
  template <int threads, class Block, class F>
  DAVE_DEVICE void each_pixel(const Block& block, const F& f) const {
    uint32_t chunk = static_cast<uint32_t>(block.index());
    const uint32_t image = blocks_an_image.split(chunk);
    block.each([&](int thread) {
      const uint32_t pixel = chunk * threads + static_cast<uint32_t>(thread);
      if (pixel < of.pixels) f(image, pixel);
    });
  }

  // Calls f with the contributions in their own dtype: double for T = double, one of the others for float.
  template <class F>
  DAVE_DEVICE auto with_type(const F& f) const {
    if constexpr (sizeof(T) == sizeof(double)) return f(static_cast<const double*>(of.values.data));
    else if (of.values.dtype == Dtype::float32) return f(static_cast<const float*>(of.values.data));
    else if (of.values.dtype == Dtype::bfloat16) return f(static_cast<const bfloat16*>(of.values.data));
    else return f(static_cast<const float16*>(of.values.data));
  }

  // Places begin, begin + stride ... of a column of n: its samples, then infinities, the first `before` of them negative.
  // Returns whether there is a NaN.
  template <int n, int stride>
  DAVE_DEVICE bool load(int64_t first, int begin, int before, T* values) const {
    const int samples = static_cast<int>(of.samples);
    with_type([&](const auto* from) {
      DAVE_UNROLL
      for (int i = 0; i < n; ++i) {
        const int s = begin + i * stride;
        const T infinity = static_cast<T>(__builtin_inf());
        if (s < samples) values[i] = widen(from[first + s * of.pixels]);
        else values[i] = s - samples < before ? -infinity : infinity;
      }
      return 0;
    });
    bool any_nan = false;
    DAVE_UNROLL
    for (int i = 0; i < n; ++i) any_nan |= values[i] != values[i];
    return any_nan;
  }

  // Stores the mean of the values within a distance of the median, and both where the variance is wanted.
  DAVE_DEVICE void store(uint32_t image, uint32_t pixel, int64_t first, T median, T within, bool any_nan) const {
    *mean(image, pixel) = mean_of_kept(first, median, within, any_nan);
    if (!statistics) return;
    T* const to = statistics + (image * of.pixels + pixel);
    to[0] = median, to[of.images * of.pixels] = within;
  }

  // The mean of the kept values, summed sample by sample.
  DAVE_DEVICE T mean_of_kept(int64_t first, T median, T within, bool any_nan) const {
    return with_type([&](const auto* from) {
      double total = 0, carry = 0;
      int count = 0;
      DAVE_UNROLL_BY(4)
      for (int64_t s = 0; s < of.samples; ++s) {
        const T value = widen(from[first + s * of.pixels]);
        const bool kept = magnitude(sub(value, median)) <= within;
        const double addend = kept ? static_cast<double>(value) : 0.0;
        count += kept ? 1 : 0;
        if constexpr (sizeof(T) == sizeof(double)) add_compensated(total, carry, addend);
        else total = add(total, addend);
      }
      return mean_of(median, any_nan, total, carry, count);
    });
  }
};

// fewest ≤ S ≤ P: one thread a pixel.
template <typename T, int P, int fewest>
struct SortInOne : RobustMeanArguments<T> {
  static constexpr int threads = 128, resident = blocks_with(threads, (P + 40) * sizeof(T) / 4), shared_bytes = 0;
  static constexpr int middle = P / 2 - 1, most_before = middle - (fewest - 1) / 2;
  const char* name = "robust_mean";
  int before;

  SortInOne(const Contributions& of, const Placement& at, T* kept, T* to)
      : RobustMeanArguments<T>(of, at, kept, to, threads), before(middle - static_cast<int>((of.samples - 1) / 2)) {}

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    this->template each_pixel<threads>(block, [&](uint32_t image, uint32_t pixel) {
      const int64_t first = this->element(image, pixel);
      T values[P];
      const bool any_nan = this->template load<P, 1>(first, 0, before, values);
      sort<P>(values);
      const T median = values[middle];
      // removes the minus infinities, so that values i and i + P / 2 are those of the formula in robust_mean.h
      shift_down<P / 2, most_before>(values, before);
      T mad = 0;
      DAVE_UNROLL
      for (int i = 0; i < P / 2; ++i)
        mad = larger_of(smaller_of(magnitude(sub(values[i], median)), magnitude(sub(values[i + P / 2], median))), mad);
      this->store(image, pixel, first, median, kept_within(mad), any_nan);
    });
  }
};

// fewest ≤ S ≤ 2·N: two threads a pixel, lane 0 with the lower half, lane 1 with the upper one negated, so
// that both run the same code.
template <typename T, int N, int fewest>
struct SortInTwo : RobustMeanArguments<T> {
  static constexpr int threads = 128, resident = blocks_with(threads, N + 100);
  static constexpr int pixels = threads / 2, most_before = N - 1 - (fewest - 1) / 2;
  const char* name = "robust_mean (two lanes)";
  int before;

  struct Statistics {
    T median[pixels], within[pixels];
    int nans[pixels][2];
  };
  static constexpr int shared_bytes = sizeof(Statistics);

  SortInTwo(const Contributions& of, const Placement& at, T* kept, T* to)
      : RobustMeanArguments<T>(of, at, kept, to, pixels), before(N - 1 - static_cast<int>((of.samples - 1) / 2)) {}

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    uint32_t chunk = static_cast<uint32_t>(block.index());
    const uint32_t image = this->blocks_an_image.split(chunk);
    const uint32_t begin = chunk * pixels;
    Statistics* found = block.template shared<Statistics>();
    block.template pairs<Lanes<T, N>>([&](int p, Lanes<T, N>& lanes) {
      // past the end the last pixel is computed again, since both lanes of every pair must take part in the exchanges
      const uint32_t last = static_cast<uint32_t>(this->of.pixels - 1), pixel = begin + static_cast<uint32_t>(p);
      sorted_pair(lanes, this->element(image, pixel < last ? pixel : last), p, *found);
    });
    block.sync();
    block.each([&](int thread) {
      const uint32_t pixel = begin + static_cast<uint32_t>(thread);
      if (thread >= pixels || pixel >= this->of.pixels) return;
      const bool any_nan = found->nans[thread][0] || found->nans[thread][1];
      this->store(image, pixel, this->element(image, pixel), found->median[thread], found->within[thread], any_nan);
    });
  }

 private:
  template <class L>
  DAVE_DEVICE void sorted_pair(L& lanes, int64_t first, int p, Statistics& found) const {
    lanes.each([&](int lane, T* values) {
      found.nans[p][lane] = this->template load<N, 2>(first, lane, before, values);
      DAVE_UNROLL
      for (int i = 0; i < N; ++i) values[i] = lane ? -values[i] : values[i];
      sort<N>(values);
    });
    // the i-th smallest below and the i-th largest above: the smaller one goes to lane 0, the larger one to lane 1
    lanes.exchange([](T mine, T partners) { return smaller_of(mine, -partners); });
    lanes.each([&](int, T* values) { sort_bitonic<N>(values); });
    const T median = lanes.of_first_lane(N - 1);
    lanes.each([&](int lane, T* values) {
      shift_down<N, most_before>(values, lane ? 0 : before);
      DAVE_UNROLL
      for (int i = 0; i < N; ++i) values[i] = magnitude(sub(lane ? -values[i] : values[i], median));
    });
    const T within = kept_within(lanes.largest_of_mirrored_minima());
    lanes.each([&](int lane, T*) {
      if (lane == 0) found.median[p] = median, found.within[p] = within;
    });
  }
};

// Any S: medians by two bits a pass, from the highest.
template <typename T, typename Given>
struct Select : RobustMeanArguments<T> {
  static constexpr int threads = 256, resident = 1, shared_bytes = 0;
  const char* name = "robust_mean (selection)";

  Select(const Contributions& of, const Placement& at, T* kept, T* to)
      : RobustMeanArguments<T>(of, at, kept, to, threads) {}

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    this->template each_pixel<threads>(block, [&](uint32_t image, uint32_t pixel) {
      const int64_t first = this->element(image, pixel);
      bool any_nan = false;
      for (int64_t s = 0; s < this->of.samples; ++s) {
        const T value = read(first, s);
        any_nan |= value != value;
      }
      const T median = number(selected([&](int64_t s) { return key(read(first, s)); }));
      const T mad = number(selected([&](int64_t s) { return key(magnitude(sub(read(first, s), median))); }));
      this->store(image, pixel, first, median, kept_within(mad), any_nan);
    });
  }

 private:
  using Key = Bits<T>;
  static constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);

  // Unsigned integers in the order of the numbers.
  DAVE_DEVICE static Key key(T value) { return bits_of(value) ^ (bits_of(value) & sign ? ~Key{0} : sign); }
  DAVE_DEVICE static T number(Key key) { return number_of(static_cast<Key>(key ^ (key & sign ? sign : ~Key{0}))); }
  DAVE_DEVICE T read(int64_t first, int64_t s) const {
    return widen(static_cast<const Given*>(this->of.values.data)[first + s * this->of.pixels]);
  }

  // The key of rank (samples - 1) / 2.
  template <class Keys>
  DAVE_DEVICE Key selected(const Keys& keys) const {
    int64_t rank = (this->of.samples - 1) / 2;
    Key prefix = 0;
    for (int shift = 8 * sizeof(Key) - 2; shift >= 0; shift -= 2) {
      int64_t zeros = 0, ones = 0, twos = 0;
      for (int64_t s = 0; s < this->of.samples; ++s) {
        const Key digits = keys(s) >> shift;
        zeros += digits == (prefix << 2);
        ones += digits == ((prefix << 2) | 1);
        twos += digits == ((prefix << 2) | 2);
      }
      const Key digit = rank < zeros ? 0 : rank < zeros + ones ? 1 : rank < zeros + ones + twos ? 2 : 3;
      rank -= (digit > 0 ? zeros : 0) + (digit > 1 ? ones : 0) + (digit > 2 ? twos : 0);
      prefix = (prefix << 2) | digit;
    }
    return prefix;
  }
};

// The variance of the sum over the channels, after their means: one thread a pixel.
template <typename T, typename Given>
struct ChannelVariance {
  static constexpr int threads = 128, resident = 1, shared_bytes = 0;
  // channels whose statistics fit registers: most images have at most three
  static constexpr int together = 3;
  const char* name = "robust_mean (variance)";
  const Given* values;
  const T *statistics, *raw;
  double* variance;
  int64_t images, samples, channels, pixels;
  Placement placement;
  Divider blocks_an_image;

  ChannelVariance(const Contributions& of, const Placement& at, const T* kept, const T* means, double* to)
      : values(static_cast<const Given*>(of.values.data)), statistics(kept), raw(means), variance(to), images(of.images),
        samples(of.samples), channels(of.channels), pixels(of.pixels), placement(at),
        blocks_an_image(blocks_of(of.pixels, threads)) {}

  int64_t blocks() const { return images * blocks_an_image.divisor; }

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    uint32_t chunk = static_cast<uint32_t>(block.index());
    const uint32_t image = blocks_an_image.split(chunk);
    block.each([&](int thread) {
      const uint32_t pixel = chunk * threads + static_cast<uint32_t>(thread);
      if (pixel >= pixels) return;
      variance[image * pixels + pixel] = channels <= together ? of_pixel<together>(image, pixel) : of_pixel<0>(image, pixel);
    });
  }

 private:
  struct Kept {
    T median, within, mean;
  };
  DAVE_DEVICE Kept kept(uint32_t image, uint32_t pixel, int64_t c) const {
    const T* of = statistics + ((image * channels + c) * pixels + pixel);
    const int64_t place = placement.offset + image * channels * pixels + c * placement.plane + pixel;
    return {of[0], of[images * channels * pixels], raw[place]};
  }

  // Most: a bound of the channels, 0 for none.
  template <int Most>
  DAVE_DEVICE double of_pixel(uint32_t image, uint32_t pixel) const {
    const Given* from = values + (image * samples * channels * pixels + pixel);
    Kept known[Most > 0 ? Most : 1];
    DAVE_UNROLL
    for (int c = 0; c < Most; ++c) known[c] = kept(image, pixel, c < channels ? c : 0);
    double squares = 0;
    int64_t count = 0;
    bool any_nan = false;
    DAVE_UNROLL_BY((Most > 0 ? 4 : 1))
    for (int64_t s = 0; s < samples; ++s) {
      T sum = 0;
      DAVE_UNROLL_BY((Most > 0 ? Most : 1))
      for (int64_t c = 0; c < (Most > 0 ? Most : channels); ++c) {
        // beyond the last channel the first is loaded and left out: without a branch the loads overlap
        const bool there = c < channels;
        const Kept k = Most > 0 ? known[Most > 0 ? c : 0] : kept(image, pixel, c);
        const T value = widen(from[(s * channels + (there ? c : 0)) * pixels]);
        const bool is_kept = there && magnitude(sub(value, k.median)) <= k.within;
        sum = add(sum, deviation(value, k.mean, is_kept));
        count += is_kept ? 1 : 0;
        any_nan |= k.mean != k.mean;
      }
      squares = add_square(squares, sum);
    }
    return any_nan ? __builtin_nan("") : variance_of(squares, static_cast<double>(count), channels);
  }
};

}  // namespace dave::DAVE_ISA
