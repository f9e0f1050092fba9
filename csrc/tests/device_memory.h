// Memory that the kernels of cuda.h run on: a device's, or the host's where they are run there. Copies wait for kernels.
#pragma once

#include <cstddef>

void* device_new(size_t bytes);
void device_delete(void* memory);
void copy_to_device(void* to, const void* from, size_t bytes);
void copy_from_device(void* to, const void* from, size_t bytes);
