// The level in use and the questions asked of the processor to choose it.
#include "levels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

// On Zen 5 few streams, which its own prefetcher follows, took 0.75 to 0.9 of the time of ten side by side; on an older
// EPYC a single stream stayed at 0.7 of the bandwidth.
bool is_zen5_or_newer() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || c != signature_AMD_ecx) return false;
  __get_cpuid(1, &a, &b, &c, &d);
  return (a >> 8 & 15) + (a >> 20 & 255) >= 0x1a;  // the family
#else
  return false;
#endif
}

std::atomic<bool> few_streams{is_zen5_or_newer()};

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

bool reads_few_streams() { return few_streams.load(std::memory_order_relaxed); }
void set_reads_few_streams(bool few) { few_streams.store(few, std::memory_order_relaxed); }

}  // namespace fastsal
