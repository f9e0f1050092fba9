// Conversion of Python's arguments (addresses as integers, dtype codes, shapes) for both extension modules.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "kernels.h"

// An address, as a pointer of any type.
struct Address {
  uintptr_t value;

  template <typename T>
  operator T*() const { return reinterpret_cast<T*>(value); }
};

namespace pybind11::detail {

template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<uintptr_t> number;
    if (!number.load(source, convert)) return false;
    value = {number};
    return true;
  }
};

template <>
struct type_caster<dave::Dtype> {
  PYBIND11_TYPE_CASTER(dave::Dtype, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<int> number;
    if (!number.load(source, convert)) return false;
    const int code = number;
    if (code < 0 || code > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
    value = static_cast<dave::Dtype>(code);
    return true;
  }
};

}  // namespace pybind11::detail

using Shape = std::array<int64_t, 4>;
using DrawsFields = std::array<Address, 6>;

inline dave::Images images_of(Address data, dave::Dtype dtype, const Shape& shape) {
  if (dtype != dave::Dtype::float32 && dtype != dave::Dtype::float64)
    throw std::invalid_argument("images must be float32 or float64");
  const auto [count, channels, height, width] = shape;
  if (height < 1 || width < 1 || (height + 4) * (width + 4) >= (int64_t{1} << 30))
    throw std::invalid_argument("images must have between 1 and 2^30 pixels");
  return {data, dtype, count, channels, height, width};
}

// Checks against reads and writes outside of the arrays; all other checks are in Python.
inline dave::Inputs inputs_of(Address data, dave::Dtype dtype, const Shape& shape, const DrawsFields& fields, int64_t rows,
                              dave::Patch patch) {
  const dave::Images images = images_of(data, dtype, shape);
  if (patch.height < 1 || patch.width < 1 || images.height % patch.height || images.width % patch.width)
    throw std::invalid_argument("patches do not fill the images");
  return {images, {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], rows}, patch};
}

// The sizes of maps whose patches have `length` values in all rows; there are no images to read.
inline dave::Inputs sizes_of(int64_t length, dave::Dtype dtype, int64_t height, int64_t width, const DrawsFields& fields,
                             int64_t rows, dave::Patch patch, int64_t samples) {
  if (samples < 1 || rows % samples) throw std::invalid_argument("rows must be a multiple of the samples");
  const dave::Inputs inputs = inputs_of({}, dtype, {rows / samples, 1, height, width}, fields, rows, patch);
  if (length != rows * (height / patch.height) * (width / patch.width))
    throw std::invalid_argument("there must be one value a row and patch");
  return inputs;
}
