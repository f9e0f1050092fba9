#include "dispatch.h"

#include <atomic>

namespace dave {

#define DAVE_DECLARE(isa)          \
  namespace isa {                  \
  extern const Kernels kernels;    \
  extern const Products products;  \
  }
#ifdef DAVE_X86
DAVE_DECLARE(avx512bf16)
DAVE_DECLARE(avx512vnni)
DAVE_DECLARE(avx512)
DAVE_DECLARE(avx2vnni)
DAVE_DECLARE(avx2)
#endif
DAVE_DECLARE(baseline)

namespace {

std::vector<Build> find_usable() {
  std::vector<Build> builds;
#ifdef DAVE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    const bool vnni = __builtin_cpu_supports("avx512vnni");
    if (vnni && __builtin_cpu_supports("avx512bf16"))
      builds.push_back({"avx512bf16", &avx512bf16::kernels, &avx512bf16::products});
    if (vnni) builds.push_back({"avx512vnni", &avx512::kernels, &avx512vnni::products});
    builds.push_back({"avx512", &avx512::kernels, &avx512::products});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avxvnni")) builds.push_back({"avx2vnni", &avx2::kernels, &avx2vnni::products});
    builds.push_back({"avx2", &avx2::kernels, &avx2::products});
  }
#endif
  builds.push_back({"baseline", &baseline::kernels, &baseline::products});
  return builds;
}

std::atomic<const Build*> chosen{nullptr};

const Build& build() {
  const Build* found = chosen.load(std::memory_order_relaxed);
  return found ? *found : usable()[0];
}

}  // namespace

const std::vector<Build>& usable() {
  static const std::vector<Build> found = find_usable();
  return found;
}

const Kernels& kernels() { return *build().kernels; }
const Products& products() { return *build().products; }
const char* isa() { return build().isa; }

bool use_isa(const std::string& name) {
  for (const Build& each : usable())
    if (name == each.isa) {
      chosen.store(&each, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace dave
