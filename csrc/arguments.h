// Conversion of Python's arguments (addresses as integers, dtype codes, shapes) for both extension modules.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline dave::Dtype dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return static_cast<dave::Dtype>(code);
}

// The dtypes that pixel ops read and store, float16 included.
inline dave::Dtype stored_dtype(int code) { return code == 3 ? dave::Dtype::float16 : dtype_of(code); }

// Checks against reads and writes outside of the arrays; all other checks are in Python.
inline void check_shapes(const dave::Images& images, dave::Patch patch) {
  if (images.height < 1 || images.width < 1 || (images.height + 4) * (images.width + 4) >= (int64_t{1} << 30))
    throw std::invalid_argument("images must have between 1 and 2^30 pixels");
  if (patch.height < 1 || patch.width < 1 || images.height % patch.height || images.width % patch.width)
    throw std::invalid_argument("patches do not fill the images");
}

inline dave::Images images_of(uintptr_t data, int dtype, const std::vector<int64_t>& shape) {
  if (shape.size() != 4) throw std::invalid_argument("a shape must have four sizes");
  return {pointer<const void>(data), dtype_of(dtype), shape[0], shape[1], shape[2], shape[3]};
}

inline dave::Draws draws_of(const std::vector<uintptr_t>& fields, int64_t rows) {
  if (fields.size() != 6) throw std::invalid_argument("draws have six fields");
  return {pointer<const int64_t>(fields[0]), pointer<const double>(fields[1]), pointer<const double>(fields[2]),
          pointer<const double>(fields[3]),  pointer<const int64_t>(fields[4]), pointer<const int64_t>(fields[5]),
          rows};
}
