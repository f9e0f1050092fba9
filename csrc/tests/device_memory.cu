#include "device_memory.h"

#include "cuda.h"

using dave::cuda::require;

void* device_new(size_t bytes) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}

void device_delete(void* memory) { require(cudaFree(memory), "cudaFree"); }

void copy_to_device(void* to, const void* from, size_t bytes) {
  require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
}

void copy_from_device(void* to, const void* from, size_t bytes) {
  require(cudaDeviceSynchronize(), "waiting for the kernels");
  require(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
}
