// Runs every CUDA kernel once or more on odd shapes, with outputs of exactly the right size, and compares with the host's
// kernels: to the bit, smooth to rounding. On a device for compute-sanitizer to watch, and, linked with serial.cpp, on the
// host for AddressSanitizer and UBSan.
#include "cuda.h"

#include <cstring>

#include "cases.h"
#include "device_memory.h"
#include "dispatch.h"
#include "grid.h"

namespace {

using dave::Dtype;
using dave::cuda::Queue;

// Memory of the device with a vector's values, and back.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& from) : count_(from.size()), data_(device_new(from.size() * sizeof(T))) {
    copy_to_device(data_, from.data(), count_ * sizeof(T));
  }
  ~OnDevice() { device_delete(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> values() const {
    std::vector<T> v(count_);
    copy_from_device(v.data(), data_, count_ * sizeof(T));
    return v;
  }

 private:
  size_t count_;
  void* data_;
};

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Whether values are equal or both NaN.
template <typename T>
bool alike(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return a.size() == b.size();
}

struct RowsOnDevice {
  OnDevice<int64_t> image_index, keys, samples;
  OnDevice<double> matrices, signal, noises;

  explicit RowsOnDevice(const Rows& rows)
      : image_index(rows.image_index), keys(rows.keys), samples(rows.samples), matrices(rows.matrices),
        signal(rows.signal), noises(rows.noises) {}
  dave::Draws draws() const {
    return {image_index.get(), matrices.get(), signal.get(), noises.get(), keys.get(), samples.get(), Rows::count};
  }
};

// The warps' ops for one kind of image, stored as `stored`, whose elements are of type S.
template <typename T, typename S>
void warps(const Queue& queue, Dtype dtype, Dtype stored, int64_t channels, int64_t height, int64_t width,
           dave::Patch patch) {
  const auto pixels = values<T>(2 * channels * height * width);
  const OnDevice<T> pixels_there(pixels);
  const Rows rows;
  const RowsOnDevice rows_there(rows);
  const dave::Inputs inputs{{pixels.data(), dtype, 2, channels, height, width}, rows.draws(), patch};
  const dave::Inputs there{{pixels_there.get(), dtype, 2, channels, height, width}, rows_there.draws(), patch};
  const int64_t n = Rows::count * channels * height * width;
  std::vector<S> tokens(static_cast<size_t>(n)), contributions(tokens.size());
  std::memset(tokens.data(), 0xFF, tokens.size() * sizeof(S));
  const OnDevice<S> tokens_there(tokens), contributions_there(tokens);
  const auto& host = dave::kernels();
  host.perturb(inputs, {tokens.data(), stored}, 1);
  dave::cuda::perturb(queue, there, {tokens_there.get(), stored});
  require(same(tokens, tokens_there.values()), "perturb differs from the host's");
  // tokens that begin anywhere: shorter runs
  const OnDevice<S> moved(std::vector<S>(tokens.size() + 1));
  dave::cuda::perturb(queue, there, {moved.get() + 1, stored});
  const auto all = moved.values();
  require(same(tokens, std::vector<S>(all.begin() + 1, all.end())), "perturb depends on where its tokens begin");
  host.pull_back({tokens.data(), stored}, inputs, {contributions.data(), stored}, 1);
  dave::cuda::pull_back(queue, {tokens_there.get(), stored}, there, {0, Rows::count}, {0, height * width},
                        {contributions_there.get(), stored});
  require(same(contributions, contributions_there.values()), "pull_back differs from the host's");
  const int64_t samples = Rows::samples_an_image;
  std::vector<T> raw(static_cast<size_t>(2 * channels * height * width), NAN);
  std::vector<double> variance(static_cast<size_t>(2 * height * width), NAN);
  host.pull_back_mean({tokens.data(), stored}, inputs, samples, {raw.data(), variance.data()}, 1);
  for (int64_t tile : {int64_t{7}, height * width})
    for (bool wanted : {false, true}) {
      const int64_t rows_of_scratch = samples + (wanted ? 2 : 0);
      const OnDevice<T> scratch(std::vector<T>(static_cast<size_t>(rows_of_scratch * channels * tile), NAN));
      const OnDevice<T> raw_there(std::vector<T>(raw.size(), NAN));
      const OnDevice<double> variance_there(std::vector<double>(variance.size(), NAN));
      dave::cuda::pull_back_mean(queue, {tokens_there.get(), stored}, there, samples, tile, scratch.get(),
                                 {raw_there.get(), wanted ? variance_there.get() : nullptr});
      require(same(raw, raw_there.values()), "pull_back_mean differs from the host's");
      require(!wanted || same(variance, variance_there.values()), "pull_back_mean's variance differs from the host's");
    }
}

template <typename T>
void spreads(const Queue& queue, Dtype dtype, int64_t height, int64_t width, dave::Patch patch) {
  const auto densities = values<T>(Rows::count * height * width / (patch.height * patch.width));
  const OnDevice<T> densities_there(densities);
  const Rows rows;
  const RowsOnDevice rows_there(rows);
  const dave::Images sizes{nullptr, dtype, 2, 1, height, width};
  const int64_t samples = Rows::samples_an_image;
  std::vector<T> mean(static_cast<size_t>(2 * height * width), NAN);
  std::vector<double> variance(mean.size(), NAN);
  const OnDevice<T> mean_there(mean);
  const OnDevice<double> variance_there(variance);
  dave::kernels().spread_mean({densities.data(), dtype}, {sizes, rows.draws(), patch}, samples,
                              {mean.data(), variance.data()}, 1);
  for (int64_t tile : {int64_t{7}, height * width}) {
    const OnDevice<T> scratch(std::vector<T>(static_cast<size_t>((samples + 2) * tile), NAN));
    dave::cuda::spread_mean(queue, {densities_there.get(), dtype}, {sizes, rows_there.draws(), patch}, samples, tile,
                            scratch.get(), {mean_there.get(), variance_there.get()});
    require(same(mean, mean_there.values()), "spread_mean differs from the host's");
    require(same(variance, variance_there.values()), "spread_mean's variance differs from the host's");
  }
}

template <typename T>
void statistics(const Queue& queue, Dtype dtype) {
  // each network, full and not, two lanes, and selection; a pixel, a whole block and a rest of one
  for (int64_t samples : {1, 5, 16, 17, 32, 33, 50, 51, 64, 65, 100, 101, 128, 129, 256, 257})
    for (int64_t pixels : {1, 64, 131}) {
      // three channels keep their statistics in registers, four do not
      const int64_t channels = samples % 2 ? 3 : 4;
      auto contributions = values<T>(2 * samples * channels * pixels);
      contributions[0] = INFINITY;
      const OnDevice<T> there(contributions);
      std::vector<T> raw(static_cast<size_t>(2 * channels * pixels), 77);
      std::vector<double> variance(static_cast<size_t>(2 * pixels), 77);
      const OnDevice<T> raw_there(raw), scratch(std::vector<T>(2 * raw.size(), NAN));
      const OnDevice<double> variance_there(variance);
      dave::kernels().robust_mean({{contributions.data(), dtype}, 2, samples, channels, pixels},
                                  {raw.data(), variance.data()}, 1);
      dave::cuda::robust_mean(queue, {{there.get(), dtype}, 2, samples, channels, pixels}, {pixels, pixels, 0},
                              scratch.get(), {raw_there.get(), variance_there.get()});
      require(alike(raw, raw_there.values()), "robust_mean differs from the host's");
      require(alike(variance, variance_there.values()), "robust_mean's variance differs from the host's");
    }
}

template <typename T>
void maps(const Queue& queue, Dtype dtype) {
  for (int64_t height : {1, 16, 19})
    for (int64_t width : {1, 33}) {
      const auto raw = values<T>(2 * 3 * height * width);
      const OnDevice<T> there(raw);
      std::vector<T> expected(static_cast<size_t>(2 * height * width), NAN);
      const OnDevice<T> found(expected), scratch(std::vector<T>(static_cast<size_t>(2 * (height * width + 1)), NAN));
      dave::kernels().smooth({raw.data(), dtype, 2, 3, height, width}, expected.data(), 1);
      dave::cuda::smooth(queue, {there.get(), dtype, 2, 3, height, width}, scratch.get(), found.get());
      std::vector<T> shrunk(expected.size(), NAN);
      const auto variance = values<double>(2 * height * width);
      const OnDevice<double> variance_there(variance);
      const OnDevice<T> shrunk_there(shrunk);
      const OnDevice<double> sums(std::vector<double>(2 * variance.size(), NAN));
      dave::kernels().shrink(variance.data(), {raw.data(), dtype, 2, 3, height, width}, shrunk.data(), 1);
      dave::cuda::shrink(queue, variance_there.get(), {there.get(), dtype, 2, 3, height, width}, sums.get(),
                         shrunk_there.get());
      require(alike(shrunk, shrunk_there.values()), "shrink differs from the host's");
      const auto maps = found.values();
      for (size_t i = 0; i < maps.size(); ++i)
        require(std::abs(maps[i] - expected[i]) <= 1e-6, "smooth differs from the host's");
    }
}

void division() {
  for (uint32_t divisor : {1u, 2u, 3u, 7u, 16u, 49u, 224u, 65535u, 65537u, 50176u, 1000003u, 0x40000001u, 0x7FFFFFFFu}) {
    const dave::portable::Divider divider(divisor);
    for (uint64_t k = 0; k < 2000; ++k)
      // around multiples of the divisor, all over the range
      for (uint64_t around : {k * divisor, k * 1073741u / divisor * divisor}) {
        for (uint64_t n : {around, around + 1, around + divisor - 1})
          if (n < (uint64_t{1} << 31))
            require(divider.quotient(static_cast<uint32_t>(n)) == n / divisor, "a division is wrong");
      }
    require(divider.quotient(0x7FFFFFFFu) == 0x7FFFFFFFu / divisor, "the largest division is wrong");
  }
}

}  // namespace

int main() {
  division();
  const Queue queue{0, nullptr};
  const std::string reason = dave::cuda::why_not(0);
  require(reason.empty(), reason.c_str());
  // patches of every run length, and images that are one token
  warps<float, float>(queue, Dtype::float32, Dtype::float32, 3, 12, 48, {6, 16});
  warps<float, uint16_t>(queue, Dtype::float32, Dtype::bfloat16, 3, 12, 48, {6, 16});
  warps<float, uint16_t>(queue, Dtype::float32, Dtype::float16, 5, 10, 42, {5, 14});
  warps<float, float>(queue, Dtype::float32, Dtype::float32, 1, 17, 33, {17, 33});
  warps<double, double>(queue, Dtype::float64, Dtype::float64, 3, 9, 20, {3, 4});
  warps<double, float>(queue, Dtype::float64, Dtype::float32, 4, 9, 6, {3, 1});
  spreads<float>(queue, Dtype::float32, 12, 48, {6, 16});
  spreads<float>(queue, Dtype::float32, 17, 33, {17, 33});
  spreads<double>(queue, Dtype::float64, 9, 20, {3, 1});
  statistics<float>(queue, Dtype::float32);
  statistics<double>(queue, Dtype::float64);
  maps<float>(queue, Dtype::float32);
  maps<double>(queue, Dtype::float64);
  std::puts("cuda smoke test passed");
}
