#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace fastsal {
namespace {

// Best first.
const Kernels* const kLevels[] = {
#if defined(__x86_64__)
    &kAvx512Kernels,
    &kAvx2Kernels,
#endif
    &kBaselineKernels,
};

bool supported(const Kernels& level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&level == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  // Every processor with AVX2 has F16C, which older compilers cannot ask for.
  if (&level == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &level == &kBaselineKernels;
}

const Kernels& find(const char* name) {
  std::string known;
  for (const Kernels* level : kLevels) {
    if (!supported(*level)) continue;
    if (name == nullptr || std::strcmp(name, level->name) == 0) return *level;
    known += std::string(known.empty() ? "" : ", ") + level->name;
  }
  throw std::invalid_argument(std::string("SIMD level '") + name + "': this machine runs " + known);
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* level = current.load(std::memory_order_relaxed);
  if (level == nullptr) {
    const char* name = std::getenv("FASTSAL_SIMD");
    level = &find(name != nullptr && *name != '\0' ? name : nullptr);
    current.store(level, std::memory_order_relaxed);
  }
  return *level;
}

void set_simd_level(const std::string& name) { current.store(&find(name.c_str()), std::memory_order_relaxed); }

}  // namespace fastsal
