// Inputs and checks that the smoke tests of the host's and of CUDA's kernels share.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../kernels.h"

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "smoke test failed: %s\n", what);
  std::exit(1);
}

// Keys need only differ; they need not be random.
inline double noise(int64_t i) { return std::sin(12.9898 * static_cast<double>(i)) * 2; }

template <typename T>
std::vector<T> values(int64_t n) {
  std::vector<T> v(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) v[static_cast<size_t>(i)] = static_cast<T>(noise(i));
  return v;
}

// Draws of two images.
struct Rows {
  static constexpr int64_t count = 6, samples_an_image = count / 2;
  std::vector<int64_t> image_index, keys, samples;
  std::vector<double> matrices, signal, noises;

  Rows() {
    // the identity, a turn by 20°, a quarter turn with a shift, a strong zoom out, a strong zoom in, far outside
    const double maps[count][6] = {{1, 0, 0, 0, 1, 0}, {0.94, 0.34, -1, -0.34, 0.94, 2}, {0, 1, -3.5, -1, 0, 9},
                                   {4, 1, -7, -1, 4, 2}, {0.2, 0.05, 1, -0.05, 0.2, 2}, {1, 0, 1e9, 0, -1, -1e9}};
    for (int64_t r = 0; r < count; ++r) {
      image_index.push_back(r / samples_an_image);
      matrices.insert(matrices.end(), maps[r], maps[r] + 6);
      signal.push_back(1 - 0.15 * static_cast<double>(r)), noises.push_back(0.15 * static_cast<double>(r));
      keys.push_back(0xFFFFFFFF - r), keys.push_back(r), samples.push_back(7 * r);
    }
  }
  dave::Draws draws() const {
    return {image_index.data(), matrices.data(), signal.data(), noises.data(), keys.data(), samples.data(), count};
  }
};
