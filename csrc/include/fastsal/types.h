// The norms and the types of entries that all native code knows, with their codes on the Python side.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FASTSAL_HD __host__ __device__
#else
#define FASTSAL_HD
#endif

namespace fastsal {

// Codes of the norms: q, the dual that measures gradients, with kMax for q = infinity.
constexpr int kMax = 0, kL1 = 1, kL2 = 2;

// The norm p whose dual is q, which is also the dual of p.
constexpr int dual_norm(int q) { return q == kL2 ? kL2 : q == kL1 ? kMax : kL1; }

// Codes of the types that the Jacobian comes in.
enum Dtype { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3, kDtypes = 4 };

// The bits of a float16 and of a bfloat16.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace fastsal
