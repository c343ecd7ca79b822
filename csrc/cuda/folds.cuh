// The arithmetic of folds. The fold of entries is the q-norm before its root: the sum of their squares (q = 2), the sum
// of their magnitudes (q = 1), or the largest magnitude (q = infinity).
#pragma once

#include <cmath>

#include "fastsal/half.h"

namespace fastsal {

// The larger of two numbers that are not negative; NaN is above all. float32 is compared as integers, since one
// comparison then sees NaN too.
FASTSAL_HD inline float larger(float a, float b) {
  const uint32_t x = bit_cast<uint32_t>(a), y = bit_cast<uint32_t>(b);
  return bit_cast<float>(x > y ? x : y);
}
FASTSAL_HD inline double larger(double a, double b) { return b > a || b != b ? b : a; }

// Joins the folds of two sets of entries.
template <int q, class R>
FASTSAL_HD inline R join(R a, R b) {
  if constexpr (q == kMax) {
    return larger(a, b);
  } else {
    return a + b;
  }
}

// The fold with one more entry.
template <int q, class R>
FASTSAL_HD inline R fold(R sum, R entry) {
  if constexpr (q == kL2) {
    return std::fma(entry, entry, sum);
  } else {
    return join<q>(sum, std::fabs(entry));
  }
}

// The norm of a complete fold.
template <int q>
FASTSAL_HD inline double root(double fold) {
  return q == kL2 ? sqrt(fold) : fold;
}

template <int q>
constexpr int kPrimal = dual_norm(q);  // ‖x‖ is a p-norm

// A fold of many parts. Sums keep what rounding loses (Knuth's two-sum), so that neither the number of parts nor
// float32 shows; this costs six float32 additions where a flush to float64 would wait for a consumer GPU's few float64
// units.
template <int q, class R>
struct Running {
  R sum = 0, lost = 0;
  FASTSAL_HD inline void add(R part) {
    if constexpr (q == kMax) {
      sum = larger(sum, part);
    } else {
      const R next = sum + part, back = next - sum;
      lost += (sum - (next - back)) + (part - back);
      sum = next;
    }
  }
  // An infinite sum has lost NaN: it stays infinite.
  FASTSAL_HD inline double total() const {
    return std::fabs(sum) == INFINITY ? sum : static_cast<double>(sum) + static_cast<double>(lost);
  }
};

}  // namespace fastsal
