// perturb on a GPU: a thread computes `Run` neighbouring pixels of a token, in every channel.
//
// Threads follow the order of the tokens, so that a warp writes contiguous memory: 16 bytes a thread where the patch
// width is divisible. The image is read through the caches, which all of its S samples share. One Philox block gives the
// deviates of four neighbouring pixels.
#pragma once

#include "grid.h"
#include "perturb.h"
#include "random.h"

namespace dave::DAVE_ISA {

// The values of one draw that all threads of a block share.
template <typename T>
struct PerturbRow {
  Affine<T> map;
  T signal, noise;
  uint32_t key_low, key_high, sample;
  int64_t image;

  DAVE_HD PerturbRow(const Draws& draws, int64_t r)
      : map(draws.matrices + 6 * r), signal(static_cast<T>(draws.signal[r])), noise(static_cast<T>(draws.noise[r])),
        key_low(static_cast<uint32_t>(draws.keys[2 * r])), key_high(static_cast<uint32_t>(draws.keys[2 * r + 1])),
        sample(static_cast<uint32_t>(draws.samples[r])), image(draws.image_index[r]) {}
};

// The deviates of `Run` elements from `element` on, a multiple of Run.
template <int Run, typename T>
DAVE_DEVICE void deviates_of(const PerturbRow<T>& row, int64_t element, float* deviates) {
  const uint32_t block = static_cast<uint32_t>(element / 4);
  if constexpr (Run >= 4) {
    DAVE_UNROLL
    for (int b = 0; b < Run / 4; ++b) {
      float* d = deviates + 4 * b;
      normal_block(block + static_cast<uint32_t>(b), row.sample, row.key_low, row.key_high, d[0], d[1], d[2], d[3]);
    }
  } else {
    uint32_t w0 = block, w1 = row.sample, w2 = noise_stream, w3 = 0;
    philox4x32(w0, w1, w2, w3, row.key_low, row.key_high);
    const bool second_pair = element & 2;
    float first, second;
    box_muller(second_pair ? w2 : w0, second_pair ? w3 : w1, first, second);
    if constexpr (Run == 2) deviates[0] = first, deviates[1] = second;
    else deviates[0] = element & 1 ? second : first;
  }
}

template <typename T, int Run>
struct Perturb {
  static constexpr int threads = 128, resident = blocks_with(threads, (Run == 8 ? 100 : 64) * sizeof(T) / 4);
  static constexpr int shared_bytes = sizeof(PerturbRow<T>);
  const char* name = "perturb";
  const T* images;
  Draws draws;
  Output tokens;
  int64_t count;
  int32_t channels, height, width, patch_area, patch_width;
  uint32_t runs;
  Divider runs_a_line, lines_a_patch, patches_x, blocks_a_row;

  Perturb(const Inputs& inputs, Output to) : Perturb(inputs.images, inputs.draws, inputs.patch, to) {}
  Perturb(const Images& from, const Draws& of, Patch patch, Output to)
      : images(static_cast<const T*>(from.data)), draws(of), tokens(to), count(from.count),
        channels(static_cast<int32_t>(from.channels)), height(static_cast<int32_t>(from.height)),
        width(static_cast<int32_t>(from.width)), patch_area(static_cast<int32_t>(patch.height * patch.width)),
        patch_width(static_cast<int32_t>(patch.width)), runs(static_cast<uint32_t>(from.height * from.width / Run)),
        runs_a_line(patch.width / Run), lines_a_patch(patch.height), patches_x(from.width / patch.width),
        blocks_a_row(blocks_of(runs, threads)) {}

  int64_t blocks() const { return draws.rows * blocks_a_row.divisor; }

  template <class Block>
  DAVE_DEVICE void operator()(const Block& block) const {
    PerturbRow<T>* row = block.template shared<PerturbRow<T>>();
    uint32_t chunk = static_cast<uint32_t>(block.index());
    const uint32_t r = blocks_a_row.split(chunk);
    block.each([&](int thread) {
      if (thread == 0) *row = PerturbRow<T>(draws, r);
    });
    block.sync();
    block.each([&](int thread) {
      const uint32_t run = chunk * threads + static_cast<uint32_t>(thread);
      if (run < runs) make(*row, r, run);
    });
  }

 private:
  DAVE_DEVICE void make(const PerturbRow<T>& row, uint32_t r, uint32_t run) const {
    uint32_t in_line = run;
    const uint32_t line = runs_a_line.split(in_line);
    uint32_t in_patch = line;
    const uint32_t token = lines_a_patch.split(in_patch);
    uint32_t column = token;
    const uint32_t token_row = patches_x.split(column);
    const int32_t x = static_cast<int32_t>(column) * patch_width + static_cast<int32_t>(in_line) * Run;
    const int32_t y = static_cast<int32_t>(token_row * lines_a_patch.divisor + in_patch);
    Taps<T> taps[Run];
    DAVE_UNROLL
    for (int i = 0; i < Run; ++i) taps[i] = taps_at(row.map, static_cast<T>(x + i), static_cast<T>(y), height, width);

    const int64_t plane = static_cast<int64_t>(height) * width;
    const int64_t tokens_a_row = plane / patch_area;
    int64_t to = (r * tokens_a_row + token) * channels * patch_area + in_patch * patch_width + in_line * Run;
    const bool known = row.image >= 0 && row.image < count;
    const T* image = images + (known ? row.image : 0) * channels * plane;
    int64_t element = static_cast<int64_t>(y) * width + x;
    for (int32_t c = 0; c < channels; ++c, image += plane, element += plane, to += patch_area) {
      T values[Run];
      DAVE_UNROLL
      for (int i = 0; i < Run; ++i) values[i] = mul(row.signal, sample(taps[i], image));
      if (row.noise != 0) {
        float deviates[Run];
        deviates_of<Run>(row, element, deviates);
        DAVE_UNROLL
        for (int i = 0; i < Run; ++i) values[i] = add(values[i], mul(row.noise, static_cast<T>(deviates[i])));
      }
      // NaN for an image outside of the batch, which only the device can detect
      DAVE_UNROLL
      for (int i = 0; i < Run; ++i) values[i] = known ? values[i] : static_cast<T>(__builtin_nan(""));
      store_run<Run>(values, tokens, to);
    }
  }

  DAVE_DEVICE T sample(const Taps<T>& t, const T* image) const {
    const bool left = static_cast<uint32_t>(t.left) < static_cast<uint32_t>(width);
    const bool right = static_cast<uint32_t>(t.left + 1) < static_cast<uint32_t>(width);
    const bool upper = static_cast<uint32_t>(t.top) < static_cast<uint32_t>(height);
    const bool lower = static_cast<uint32_t>(t.top + 1) < static_cast<uint32_t>(height);
    const int32_t first = t.top * width + t.left;
    return bilinear(t.upper_left, t.upper_right, t.lower_left, t.lower_right,
                    upper && left ? image[first] : static_cast<T>(0),
                    upper && right ? image[first + 1] : static_cast<T>(0),
                    lower && left ? image[first + width] : static_cast<T>(0),
                    lower && right ? image[first + width + 1] : static_cast<T>(0));
  }
};

}  // namespace dave::DAVE_ISA
