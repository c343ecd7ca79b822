// The inner loops for AVX-512 (F, BW, DQ, VL).
#include <stddef.h>
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

// After the headers, so that no shared inline function is compiled for this level.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma")
#endif

#define FASTSAL_F16C
#define FASTSAL_FMA
#define FASTSAL_LEVEL "avx512"
#define FASTSAL_BYTES 64

namespace fastsal {
namespace {
#include "level.h"
}  // namespace
const Kernels kAvx512Kernels = kTable;
}  // namespace fastsal

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
