#include <cstdlib>
#include <cstring>

#include "device_memory.h"

void* device_new(size_t bytes) { return std::malloc(bytes); }
void device_delete(void* memory) { std::free(memory); }
void copy_to_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void copy_from_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
