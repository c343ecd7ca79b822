// The inner loops for the instructions that every processor of the architecture has: SSE2 on x86-64, NEON on AArch64.
#include <stddef.h>

#include "kernels.h"

#if defined(__aarch64__)
#define FASTSAL_LEVEL "neon"
#else
#define FASTSAL_LEVEL "baseline"
#endif
#define FASTSAL_BYTES 16

namespace fastsal {
namespace {
#include "level.h"
}  // namespace
const Kernels kBaselineKernels = kTable;
}  // namespace fastsal
