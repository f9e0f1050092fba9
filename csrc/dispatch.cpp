#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace dave {

#ifdef DAVE_X86
namespace avx512bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace baseline { extern const Kernels kernels; }

namespace {

struct Usable {
  const Kernels* builds[4];
  int count = 0;

  Usable() {
#ifdef DAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512bf16")) builds[count++] = &avx512bf16::kernels;
      builds[count++] = &avx512::kernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) builds[count++] = &avx2::kernels;
#endif
    builds[count++] = &baseline::kernels;
  }
};

const Usable& usable() {
  static const Usable found;
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* build = chosen.load(std::memory_order_relaxed);
  return build ? *build : *usable().builds[0];
}

const char* usable_isa(int i) { return i < usable().count ? usable().builds[i]->isa : nullptr; }

bool use_isa(const char* name) {
  for (int i = 0; i < usable().count; ++i)
    if (std::strcmp(usable().builds[i]->isa, name) == 0) {
      chosen.store(usable().builds[i], std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace dave
