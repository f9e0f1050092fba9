// The ops on a GPU: device pointers, sizes, and the stream to launch on, without torch. Callers check shapes.
//
// nvcc compiles the .cu files for a device; a C++ compiler makes of them the same kernels block by block on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#endif

namespace dave::cuda {

// Where to launch: a device's number and a cudaStream_t of it.
struct Queue {
  int device;
  void* stream;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Why kernels cannot run on a device; empty where they can.
std::string why_not(int device);

void perturb(const Queue& queue, const Inputs& inputs, Output tokens);

// Rows of the draws, and source pixels of each plane.
struct Rows {
  int64_t first, count;
};
// Source pixels of each plane.
struct Span {
  int64_t first, pixels;
};

// Contributions (rows.count, channels, span.pixels) of part of the rows and of the source pixels, for pull_back_mean.
void pull_back(const Queue& queue, Values cotangents, const Inputs& inputs, Rows rows, Span span, Output contributions);

// Densities (rows.count, 1, span.pixels) of part of the rows and of the source pixels, pulled back, for spread_mean;
// given (rows, patches) of the images' type. Of the images, of one channel, only the sizes are read, of the draws the
// matrices.
void spread(const Queue& queue, Values densities, const Inputs& inputs, Rows rows, Span span, Output pulled);

// The place of the mean of pixel p of an image's contributions, its channels one after the other: offset +
// p / span·plane + p % span.
struct Placement {
  int64_t span, plane, offset;
};

// One mean a pixel and channel; float64 for float64, else float32. The variance, where it is wanted, has one value a
// pixel, and needs 2·images·channels·pixels values of raw's type as scratch.
void robust_mean(const Queue& queue, const Contributions& contributions, const Placement& placement, void* scratch,
                 Means to);

// scratch: samples·channels·tile values of the images' type, with the variance (samples + 2)·channels·tile; raw (rows /
// samples, channels, height, width)
void pull_back_mean(const Queue& queue, Values cotangents, const Inputs& inputs, int64_t samples, int64_t tile,
                    void* scratch, Means to);

// The same of densities, as `spread` takes them.
void spread_mean(const Queue& queue, Values densities, const Inputs& inputs, int64_t samples, int64_t tile,
                 void* scratch, Means to);

// variance and shrunk (count, height, width); scratch: 2·count·height·width values
void shrink(const Queue& queue, const double* variance, const Images& raw, double* scratch, void* shrunk);

// scratch: count·(height·width + 1) values of raw's type
void smooth(const Queue& queue, const Images& raw, void* scratch, void* maps);

#ifdef __CUDACC__
inline void require(cudaError_t code, const std::string& what) {
  if (code != cudaSuccess)
    throw Error(what + ": " + cudaGetErrorName(code) + ", " + cudaGetErrorString(code));
}

// Sets the current device for a scope.
class Device {
 public:
  explicit Device(int device) {
    require(cudaGetDevice(&before_), "asking for the current device");
    require(cudaSetDevice(device), "taking device " + std::to_string(device));
  }
  ~Device() { cudaSetDevice(before_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

 private:
  int before_ = 0;
};
#endif

}  // namespace dave::cuda
