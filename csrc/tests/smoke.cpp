// Runs every pixel kernel on odd shapes with outputs of exactly the right size, for AddressSanitizer and UBSan to watch;
// checks that every output was written and is what it should be where that is easy to say.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "dispatch.h"

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "smoke test failed: %s\n", what);
  std::exit(1);
}

// The words of Philox would do; these need only differ.
double noise(int i) { return std::sin(12.9898 * i) * 2; }

template <typename T>
std::vector<T> values(int64_t n) {
  std::vector<T> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<T>(noise(static_cast<int>(i)));
  return v;
}

template <typename T>
void require_finite(const std::vector<T>& v, const char* what) {
  for (T value : v) require(std::isfinite(value), what);
}

struct Rows {
  std::vector<int64_t> image_index, keys, samples;
  std::vector<double> matrices, signal, noise;

  explicit Rows(int64_t images) {
    // the identity, a quarter turn with a shift, a strong zoom out, a strong zoom in, far outside
    const double maps[5][6] = {{1, 0, 0, 0, 1, 0}, {0, 1, -3.5, -1, 0, 9}, {4, 1, -7, -1, 4, 2},
                               {0.2, 0.05, 1, -0.05, 0.2, 2}, {1, 0, 1e9, 0, -1, -1e9}};
    for (int64_t r = 0; r < 5; ++r) {
      image_index.push_back(r % images);
      matrices.insert(matrices.end(), maps[r], maps[r] + 6);
      signal.push_back(1 - 0.2 * static_cast<double>(r)), noise.push_back(0.2 * static_cast<double>(r));
      keys.push_back(0xFFFFFFFF - r), keys.push_back(r), samples.push_back(7 * r);
    }
  }
  dave::Draws draws() const {
    return {image_index.data(), matrices.data(), signal.data(), noise.data(), keys.data(), samples.data(), 5};
  }
};

template <typename T>
void warps(dave::Dtype dtype, int64_t channels, int64_t height, int64_t width, dave::Patch patch, int threads) {
  const auto pixels = values<T>(2 * channels * height * width);
  const dave::Images images{pixels.data(), dtype, 2, channels, height, width};
  const Rows rows(2);
  const auto n = static_cast<size_t>(5 * channels * height * width);
  std::vector<T> tokens(n, NAN), contributions(n, NAN);
  std::vector<uint16_t> stored(n, 0x7FC0);
  const auto& kernels = dave::kernels();
  kernels.perturb(images, rows.draws(), patch, tokens.data(), dtype, threads);
  require_finite(tokens, "perturb left something unwritten");
  kernels.perturb(images, rows.draws(), patch, stored.data(), dave::Dtype::bfloat16, threads);
  for (uint16_t word : stored) require((word & 0x7FFF) < 0x7F80, "perturb left a bfloat16 unwritten");
  kernels.pull_back(tokens.data(), dtype, images, rows.draws(), patch, contributions.data(), dtype, threads);
  require_finite(contributions, "pull_back left something unwritten");
  // the last row lies outside of its source: no contribution at all
  for (size_t i = n / 5 * 4; i < n; ++i) require(contributions[i] == 0, "a far-off warp contributes");
}

template <typename T>
void statistics(dave::Dtype dtype, int threads) {
  const auto& kernels = dave::kernels();
  for (int64_t samples : {1, 2, 3, 7, 50}) {
    for (int64_t pixels : {1, 31, 257}) {
      auto contributions = values<T>(2 * samples * pixels);
      contributions[0] = NAN;
      std::vector<T> raw(static_cast<size_t>(2 * pixels), 77);
      kernels.robust_mean(contributions.data(), dtype, 2, samples, pixels, raw.data(), threads);
      require(std::isnan(raw[0]), "robust_mean hid a NaN");
      for (size_t i = 1; i < raw.size(); ++i) require(std::abs(raw[i]) <= 2, "robust_mean is out of range");
    }
  }
  for (int64_t height : {1, 4, 19}) {
    const auto raw = values<T>(2 * 3 * height * 7);
    std::vector<T> maps(static_cast<size_t>(2 * height * 7), NAN);
    kernels.smooth({raw.data(), dtype, 2, 3, height, 7}, maps.data(), threads);
    for (T value : maps) require(value >= 0 && value <= 1, "smooth is out of range");
  }
}

}  // namespace

int main() {
  for (int i = 0; dave::usable_isa(i); ++i) {
    require(dave::use_isa(dave::usable_isa(i)), "a usable instruction set cannot be used");
    for (int threads : {1, 3}) {
      warps<float>(dave::Dtype::float32, 3, 10, 14, {5, 7}, threads);
      warps<double>(dave::Dtype::float64, 1, 9, 3, {3, 1}, threads);
      warps<float>(dave::Dtype::float32, 4, 17, 33, {17, 33}, threads);
      statistics<float>(dave::Dtype::float32, threads);
      statistics<double>(dave::Dtype::float64, threads);
      for (int64_t elements : {1, 5, 1025}) {
        const int64_t keys[2] = {1, 2}, samples[1] = {3};
        std::vector<float> deviates(static_cast<size_t>(elements), NAN);
        dave::kernels().normal(keys, samples, 1, elements, deviates.data(), threads);
        require_finite(deviates, "normal left something unwritten");
      }
    }
  }
  require(!dave::use_isa("mmx"), "an unknown instruction set is taken");
  std::puts("smoke test passed");
}
