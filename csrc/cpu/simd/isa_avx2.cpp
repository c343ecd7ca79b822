// The inner loops for AVX2 with FMA.
#include <stddef.h>
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

// After the headers, so that no shared inline function is compiled for this level.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,fma")
#endif

#define FASTSAL_F16C
#define FASTSAL_FMA
#define FASTSAL_LEVEL "avx2"
#define FASTSAL_BYTES 32

namespace fastsal {
namespace {
#include "level.h"
}  // namespace
const Kernels kAvx2Kernels = kTable;
}  // namespace fastsal

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
