// Python's arguments for both extension modules, and their checks: a kernel reads and writes the memory that it was given,
// and no more. A tensor arrives as (address, number of values, dtype code); shapes and strides are numbers.
//
// Every error is a std::invalid_argument, ValueError in Python, and is thrown before any memory is touched.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

// The memory of a contiguous tensor, or from the first to the last value of a strided one.
struct Array {
  uintptr_t address;
  int64_t length;
  // of dave::Dtype, or one of `code_of`
  int dtype;
};

// A number of threads.
struct Threads {
  int count;
  operator int() const { return count; }
};

inline void expect(bool condition, const char* words) {
  if (!condition) throw std::invalid_argument(words);
}

template <typename T>
constexpr int code_of = -1;
template <>
inline constexpr int code_of<float> = static_cast<int>(dave::Dtype::float32);
template <>
inline constexpr int code_of<double> = static_cast<int>(dave::Dtype::float64);
template <>
inline constexpr int code_of<int64_t> = 4;
template <>
inline constexpr int code_of<int32_t> = 5;
// bytes of a value, by its code
constexpr std::array<int64_t, 6> bytes_of{4, 8, 2, 2, 8, 4};

namespace pybind11::detail {

template <>
struct type_caster<Array> {
  PYBIND11_TYPE_CASTER(Array, const_name("tuple[int, int, int]"));
  bool load(handle source, bool convert) {
    make_caster<std::tuple<uintptr_t, int64_t, int>> parts;
    if (!parts.load(source, convert)) return false;
    const auto [address, length, dtype] = cast_op<std::tuple<uintptr_t, int64_t, int>>(parts);
    expect(dtype >= 0 && dtype < static_cast<int>(bytes_of.size()), "a dtype code is unknown");
    value = {address, length, dtype};
    return true;
  }
};

template <>
struct type_caster<Threads> {
  PYBIND11_TYPE_CASTER(Threads, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<int> number;
    if (!number.load(source, convert)) return false;
    value = {number};
    expect(value.count >= 1 && value.count <= 65536, "there must be between 1 and 65,536 threads");
    return true;
  }
};

}  // namespace pybind11::detail

using Shape = std::array<int64_t, 4>;
using DrawsFields = std::array<Array, 6>;
using Optional = std::optional<Array>;

// More values than any memory has; products of a few such sizes and a kernel's constants still fit 64 bits.
constexpr int64_t most_values = int64_t{1} << 48;
// A sorting network numbers its lanes by 32 bits.
constexpr int64_t most_samples = int64_t{1} << 26;

// The number of values of an array with these sizes.
inline int64_t count_of(std::initializer_list<int64_t> sizes) {
  int64_t count = 1;
  bool empty = false;
  for (int64_t size : sizes) {
    expect(size >= 0, "a size must not be negative");
    empty |= size == 0;
    // what is empty is checked too, since other products are made of the same sizes
    if (size > 0 && (__builtin_mul_overflow(count, size, &count) || count >= most_values))
      throw std::invalid_argument("a size is too large: arrays have fewer than 2^48 values");
  }
  return empty ? 0 : count;
}

inline void* memory_of(const Array& array, int64_t length, const char* name) {
  if (array.length != length)
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(length) + " values; it has " +
                                std::to_string(array.length));
  if ((length && !array.address) || array.address % static_cast<uintptr_t>(bytes_of[array.dtype]))
    throw std::invalid_argument(std::string(name) + " has no memory, or it is not aligned");
  return reinterpret_cast<void*>(array.address);
}

template <typename T>
T* memory_of(const Array& array, int64_t length, const char* name) {
  if (array.dtype != code_of<T>) throw std::invalid_argument(std::string(name) + " is of another type");
  return static_cast<T*>(memory_of(array, length, name));
}

// Null where there is none.
template <typename T>
T* memory_of(const Optional& array, int64_t length, const char* name) {
  return array ? memory_of<T>(*array, length, name) : nullptr;
}

inline dave::Dtype dtype_of(const Array& array, const char* name) {
  if (array.dtype > static_cast<int>(dave::Dtype::float16))
    throw std::invalid_argument(std::string(name) + " must be of a floating type");
  return static_cast<dave::Dtype>(array.dtype);
}

inline dave::Values values_of(const Array& array, int64_t length, const char* name) {
  return {memory_of(array, length, name), dtype_of(array, name)};
}

inline dave::Output output_of(const Array& array, int64_t length, const char* name) {
  return {memory_of(array, length, name), dtype_of(array, name)};
}

// An output of the dtype of the arithmetic.
inline void* result_of(const Array& array, int64_t length, dave::Dtype dtype, const char* name) {
  if (array.dtype != static_cast<int>(dtype)) throw std::invalid_argument(std::string(name) + " is of another type");
  return memory_of(array, length, name);
}

// Throws where an output shares memory with another array; lengths have been checked.
inline void expect_apart(const Array& output, std::initializer_list<Array> others) {
  const auto end_of = [](const Array& a) { return a.address + static_cast<uintptr_t>(a.length * bytes_of[a.dtype]); };
  for (const Array& other : others)
    expect(output.address >= end_of(other) || other.address >= end_of(output), "an output shares memory with an input");
}

// The sizes of images, whose memory is not looked at.
inline dave::Images sizes_of(const void* data, int dtype, const Shape& shape) {
  expect(dtype == code_of<float> || dtype == code_of<double>, "images must be float32 or float64");
  const auto [count, channels, height, width] = shape;
  count_of({count, channels, height, width});
  expect(channels >= 1 && height >= 1 && width >= 1, "images must have channels and pixels");
  constexpr int64_t most_pixels = int64_t{1} << 30;
  expect(height < most_pixels && width < most_pixels && (height + 4) * (width + 4) < most_pixels,
         "images must have fewer than 2^30 pixels");
  return {data, static_cast<dave::Dtype>(dtype), count, channels, height, width};
}

inline dave::Images images_of(const Array& array, const Shape& shape, const char* name = "images") {
  const dave::Images images = sizes_of(reinterpret_cast<const void*>(array.address), array.dtype, shape);
  memory_of(array, count_of({shape[0], shape[1], shape[2], shape[3]}), name);
  return images;
}

inline dave::Draws draws_of(const DrawsFields& fields) {
  const auto& [image_index, matrices, signal, noise, keys, samples] = fields;
  const int64_t rows = count_of({signal.length});
  return {memory_of<int64_t>(image_index, rows, "draws.image_index"),
          memory_of<double>(matrices, 6 * rows, "draws.matrices"),
          memory_of<double>(signal, rows, "draws.signal"),
          memory_of<double>(noise, rows, "draws.noise"),
          memory_of<int64_t>(keys, 2 * rows, "draws.keys"),
          memory_of<int64_t>(samples, rows, "draws.samples"),
          rows};
}

inline dave::Inputs inputs_of(const dave::Images& images, const DrawsFields& fields, int64_t p_h, int64_t p_w) {
  expect(p_h >= 1 && p_w >= 1 && images.height % p_h == 0 && images.width % p_w == 0, "patches do not fill the images");
  const dave::Draws draws = draws_of(fields);
  expect(draws.rows == 0 || images.count >= 1, "there are rows, and no image");
  count_of({draws.rows, images.channels, images.height, images.width});
  return {images, draws, {p_h, p_w}};
}

// The number of values of the tokens, and of the contributions, of all rows.
inline int64_t values_of_rows(const dave::Inputs& inputs) {
  const auto& [images, draws, patch] = inputs;
  return draws.rows * images.channels * images.height * images.width;
}

inline void expect_samples(int64_t samples) {
  expect(samples >= 1 && samples < most_samples, "there must be at least one sample, and fewer than 2^26");
}

// The number of images that have `samples` rows each.
inline int64_t groups_of(int64_t rows, int64_t samples) {
  expect_samples(samples);
  expect(rows % samples == 0, "rows must be a multiple of the samples");
  return rows / samples;
}

// The sizes of maps of `rows / samples` images of one channel; there are no images to read.
inline dave::Inputs map_inputs_of(const Array& densities, const DrawsFields& fields, int64_t height, int64_t width,
                                  int64_t p_h, int64_t p_w, int64_t samples) {
  const int64_t images = groups_of(count_of({fields[2].length}), samples);
  return inputs_of(sizes_of(nullptr, densities.dtype, {images, 1, height, width}), fields, p_h, p_w);
}

inline int64_t patches_of_rows(const dave::Inputs& inputs) {
  const auto& [images, draws, patch] = inputs;
  return draws.rows * (images.height / patch.height) * (images.width / patch.width);
}

// Means of the contributions (groups, samples, channels, pixels) and, where it is wanted, the variance of their sum.
inline dave::Means means_of(const Array& raw, const Optional& variance, dave::Dtype dtype, int64_t groups,
                            int64_t channels, int64_t pixels, const char* name = "raw") {
  const int64_t length = count_of({groups, channels, pixels});
  if (variance) expect_apart(*variance, {raw});
  return {result_of(raw, length, dtype, name), memory_of<double>(variance, count_of({groups, pixels}), "variance")};
}

// What is computed of contributions of a dtype: float64 of float64, else float32.
inline dave::Dtype statistics_of(dave::Dtype dtype) {
  return dtype == dave::Dtype::float64 ? dave::Dtype::float64 : dave::Dtype::float32;
}

inline dave::Contributions contributions_of(const Array& array, int64_t images, int64_t samples, int64_t channels,
                                            int64_t pixels) {
  expect(channels >= 1, "there must be a channel");
  expect_samples(samples);
  return {values_of(array, count_of({images, samples, channels, pixels}), "contributions"), images, samples, channels,
          pixels};
}
