#include "dispatch.h"

#include <atomic>

namespace dave {

#ifdef DAVE_X86
namespace avx512bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace baseline { extern const Kernels kernels; }

namespace {

std::vector<const Kernels*> find_usable() {
  std::vector<const Kernels*> builds;
#ifdef DAVE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) builds.push_back(&avx512bf16::kernels);
    builds.push_back(&avx512::kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) builds.push_back(&avx2::kernels);
#endif
  builds.push_back(&baseline::kernels);
  return builds;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> found = find_usable();
  return found;
}

const Kernels& kernels() {
  const Kernels* build = chosen.load(std::memory_order_relaxed);
  return build ? *build : *usable()[0];
}

bool use_isa(const std::string& name) {
  for (const Kernels* build : usable())
    if (name == build->isa) {
      chosen.store(build, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace dave
