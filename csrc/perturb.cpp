// Host driver of perturb: one image row a task, whose taps are computed once for all channels.
#include "perturb.h"

#include "host.h"
#include "ops.h"
#include "random.h"

namespace dave::DAVE_ISA {
namespace {

struct Key {
  uint32_t low, high, sample;

  Key(const int64_t* keys, const int64_t* samples, int64_t r)
      : low(static_cast<uint32_t>(keys[2 * r])), high(static_cast<uint32_t>(keys[2 * r + 1])),
        sample(static_cast<uint32_t>(samples[r])) {}
};

// Philox blocks that are computed together: they are the lanes of vectors, with an array for each of the four words.
constexpr int blocks_together = 64;

// Writes the deviates of `blocks` blocks, rounded up to whole groups of blocks_together, for which there must be room.
void normal_blocks(const Key& key, int64_t first_block, int64_t blocks, float* deviates) {
  for (int64_t start = 0; start < blocks; start += blocks_together) {
    const uint32_t block = static_cast<uint32_t>(first_block + start);
    float values[4][blocks_together];
#pragma omp simd
    for (int b = 0; b < blocks_together; ++b)
      normal_block(block + static_cast<uint32_t>(b), key.sample, key.low, key.high, values[0][b], values[1][b],
                   values[2][b], values[3][b]);
    float* to = deviates + 4 * start;
    for (int b = 0; b < blocks_together; ++b)
      for (int k = 0; k < 4; ++k) to[4 * b + k] = values[k][b];
  }
}

// The size of the groups that contain n deviates, the first of which may be anywhere in its block.
constexpr int64_t room_for(int64_t n) { return n + 4 * blocks_together + 4; }

// A copy of the images that the draws use, each plane padded with a border of zeros.
template <typename T>
class PaddedImages {
 public:
  PaddedImages(const Images& images, const Draws& draws, int threads)
      : stride_(images.width + pad_before + pad_after), plane_((images.height + pad_before + pad_after) * stride_),
        channels_(images.channels), first_(used(draws).lowest),
        data_((used(draws).highest + 1 - first_) * images.channels * plane_) {
    const int64_t rows = images.height + pad_before + pad_after;
    const int64_t planes = (used(draws).highest + 1 - first_) * channels_;
    const T* source = static_cast<const T*>(images.data) + first_ * channels_ * images.height * images.width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < planes * rows; ++i) {
      const int64_t plane = i / rows, y = i % rows - pad_before;
      T* to = data_ + i * stride_;
      const bool inside = y >= 0 && y < images.height;
      const T* from = source + (plane * images.height + (inside ? y : 0)) * images.width;
      for (int64_t x = 0; x < stride_; ++x) to[x] = 0;
      if (inside) copy_row(from, to + pad_before, images.width);
    }
  }
  const T* plane(int64_t image, int64_t c) const { return data_ + ((image - first_) * channels_ + c) * plane_; }
  int32_t stride() const { return static_cast<int32_t>(stride_); }

 private:
  struct Range {
    int64_t lowest, highest;
  };
  static Range used(const Draws& draws) {
    Range range{draws.image_index[0], draws.image_index[0]};
    for (const int64_t* i = draws.image_index; i < draws.image_index + draws.rows; ++i)
      range = {*i < range.lowest ? *i : range.lowest, *i > range.highest ? *i : range.highest};
    return range;
  }
  int64_t stride_, plane_, channels_, first_;
  Scratch<T> data_;
};

// Taps of one destination row, as arrays, so that pixels are the lanes of vectors.
template <typename T>
struct TapRow {
  Scratch<int32_t> first;
  Scratch<T> upper_left, upper_right, lower_left, lower_right;

  explicit TapRow(int64_t n) : first(n), upper_left(n), upper_right(n), lower_left(n), lower_right(n) {}

  // `first` becomes the index of the upper left tap in a plane with its border.
  void fill(const Affine<T>& map, int64_t y, int32_t height, int32_t width) {
    const int32_t stride = width + pad_before + pad_after;
#pragma omp simd
    for (int32_t x = 0; x < width; ++x) {
      const Taps<T> taps = taps_at(map, static_cast<T>(x), static_cast<T>(y), height, width);
      first[x] = (taps.top + pad_before) * stride + taps.left + pad_before;
      upper_left[x] = taps.upper_left, upper_right[x] = taps.upper_right;
      lower_left[x] = taps.lower_left, lower_right[x] = taps.lower_right;
    }
  }

  void sample(const T* plane, int32_t stride, T signal, T* row, int32_t width) const {
    const T *ul = upper_left, *ur = upper_right, *ll = lower_left, *lr = lower_right, *lower = plane + stride;
    const int32_t* at = first;
#pragma omp simd
    for (int32_t x = 0; x < width; ++x)
      row[x] = mul(signal, bilinear(ul[x], ur[x], ll[x], lr[x], plane[at[x]], plane[at[x] + 1], lower[at[x]],
                                    lower[at[x] + 1]));
  }
};

// The scratch memory of one thread.
template <typename T>
struct Work {
  TapRow<T> taps;
  Scratch<T> row;
  Scratch<float> deviates;

  explicit Work(int64_t width) : taps(width), row(width), deviates(room_for(width)) {}
};

template <typename T>
void add_noise(const Key& key, int64_t element, T noise, float* deviates, T* row, int32_t width) {
  const int64_t first_block = element / 4, skipped = element % 4;
  normal_blocks(key, first_block, (skipped + width + 3) / 4, deviates);
  for (int32_t x = 0; x < width; ++x) row[x] = add(row[x], mul(noise, static_cast<T>(deviates[skipped + x])));
}

template <typename T>
void run(const Inputs& inputs, Output tokens, int threads) {
  const Images& images = inputs.images;
  const Draws& draws = inputs.draws;
  const PaddedImages<T> padded(images, draws, threads);
  const int32_t height = static_cast<int32_t>(images.height), width = static_cast<int32_t>(images.width);
  PerThread<Work<T>>(threads, images.width).run(draws.rows * height, [&](Work<T>& work, int64_t task) {
    auto& [taps, row, deviates] = work;
    const int64_t r = task / height, y = task % height;
    const Key key(draws.keys, draws.samples, r);
    const T signal = static_cast<T>(draws.signal[r]), noise = static_cast<T>(draws.noise[r]);
    taps.fill(Affine<T>(draws.matrices + 6 * r), y, height, width);
    for (int64_t c = 0; c < images.channels; ++c) {
      taps.sample(padded.plane(draws.image_index[r], c), padded.stride(), signal, row, width);
      if (noise != 0) add_noise<T>(key, (c * height + y) * width, noise, deviates, row, width);
      const TokenRow to(images, inputs.patch, r, c, y);
      for (int64_t x = 0; x < width; x += inputs.patch.width)
        store_row<T>(row + x, tokens, to.first + x / inputs.patch.width * to.step, inputs.patch.width);
    }
  });
}

}  // namespace

void perturb(const Inputs& inputs, Output tokens, int threads) {
  if (inputs.draws.rows == 0) return;
  if (inputs.images.dtype == Dtype::float64) return run<double>(inputs, tokens, threads);
  run<float>(inputs, tokens, threads);
}

void normal(const int64_t* keys, const int64_t* samples, int64_t rows, int64_t elements, float* deviates,
            int threads) {
  constexpr int64_t blocks_a_task = 256;
  const int64_t blocks = (elements + 3) / 4, tasks = (blocks + blocks_a_task - 1) / blocks_a_task;
  using Buffer = Scratch<float>;
  PerThread<Buffer>(threads, room_for(4 * blocks_a_task)).run(rows * tasks, [&](const Buffer& buffer, int64_t task) {
    const int64_t r = task / tasks, first = task % tasks * blocks_a_task;
    const int64_t count = blocks - first < blocks_a_task ? blocks - first : blocks_a_task;
    const int64_t wanted = elements - 4 * first < 4 * count ? elements - 4 * first : 4 * count;
    normal_blocks(Key(keys, samples, r), first, count, buffer);
    copy_row<float, float>(buffer, deviates + r * elements + 4 * first, wanted);
  });
}

}  // namespace dave::DAVE_ISA
