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
