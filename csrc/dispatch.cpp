#include "dispatch.h"

#include <atomic>

#if defined(DAVE_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(DAVE_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

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
#elif defined(DAVE_ARM)
DAVE_DECLARE(neonbf16)
DAVE_DECLARE(dotprod)
#endif
DAVE_DECLARE(baseline)

namespace {

#ifdef DAVE_ARM
// Whether the operating system names a feature: by a bit of Linux's AT_HWCAP or AT_HWCAP2, and in words on macOS.
bool has([[maybe_unused]] unsigned long vector, [[maybe_unused]] int bit, [[maybe_unused]] const char* name) {
#if defined(__linux__)
  return getauxval(vector) >> bit & 1;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname(name, &found, &size, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}
#endif

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
#elif defined(DAVE_ARM)
  // AT_HWCAP is 16 and AT_HWCAP2 26; these bits are younger than some systems' headers
  if (has(16, 20, "hw.optional.arm.FEAT_DotProd")) {
    if (has(26, 13, "hw.optional.arm.FEAT_I8MM") && has(26, 14, "hw.optional.arm.FEAT_BF16"))
      builds.push_back({"neonbf16", &neonbf16::kernels, &neonbf16::products});
    builds.push_back({"dotprod", &baseline::kernels, &dotprod::products});
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
