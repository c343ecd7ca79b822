// The arithmetic of folds. The fold of entries is the q-norm before its root: the sum of their squares (q = 2), the sum
// of their magnitudes (q = 1), or the largest magnitude (q = infinity).
#pragma once

#include <cmath>

#include "elements.cuh"
#include "fastsal/scaled.h"

namespace fastsal {

// The larger of two numbers that are not negative; NaN is above all. float32 is compared as integers, since one
// comparison then sees NaN too.
FASTSAL_HD inline float larger(float a, float b) {
  const uint32_t x = bit_cast<uint32_t>(a), y = bit_cast<uint32_t>(b);
  return bit_cast<float>(x > y ? x : y);
}
FASTSAL_HD inline double larger(double a, double b) { return b > a || b != b ? b : a; }

FASTSAL_HD inline float magnitude(float v) { return bit_cast<float>(bit_cast<uint32_t>(v) & 0x7fffffffu); }
FASTSAL_HD inline double magnitude(double v) { return bit_cast<double>(bit_cast<uint64_t>(v) & 0x7fffffffffffffffull); }
FASTSAL_HD inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTSAL_HD inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

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
    return multiply_add(entry, entry, sum);
  } else {
    return join<q>(sum, magnitude(entry));
  }
}

// v * 2^exponent, in steps, since 2^exponent itself may lie outside the range of float64.
FASTSAL_HD inline double shift(double v, int64_t exponent) {
  exponent = exponent < -3000 ? -3000 : exponent > 3000 ? 3000 : exponent;
  const int64_t third = exponent / 3;
  const int64_t steps[3] = {third, third, exponent - 2 * third};
  for (int64_t step : steps) v *= bit_cast<double>(static_cast<uint64_t>(step + 1023) << 52);
  return v;
}

template <int q>
FASTSAL_HD inline Scaled join(Scaled a, Scaled b) {
  if (b.value == 0) return a;
  if (a.value == 0) return b;
  const int64_t exponent = a.exponent > b.exponent ? a.exponent : b.exponent;
  return {join<q>(shift(a.value, a.exponent - exponent), shift(b.value, b.exponent - exponent)), exponent};
}

// The norm of a complete fold. The exponent of a sum of squares is even.
template <int q>
FASTSAL_HD inline Scaled root(Scaled fold) {
  return q == kL2 ? Scaled{sqrt(fold.value), fold.exponent / 2} : fold;
}

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
    return magnitude(sum) == INFINITY ? sum : static_cast<double>(sum) + static_cast<double>(lost);
  }
};

// How a fold travels between kernels: float64 holds the square of any float32, so only float64 needs the exponent.
template <class T>
struct FoldOf {
  using type = double;
  static FASTSAL_HD inline double make(double value, int64_t) { return value; }
  static FASTSAL_HD inline Scaled scaled(double fold) { return {fold, 0}; }
};
template <>
struct FoldOf<double> {
  using type = Scaled;
  static FASTSAL_HD inline Scaled make(double value, int64_t exponent) { return {value, exponent}; }
  static FASTSAL_HD inline Scaled scaled(Scaled fold) { return fold; }
};
template <class T>
using Fold = typename FoldOf<T>::type;

// e with 2^e <= v < 2^(e+1); 0 for zero, NaN and infinity.
FASTSAL_HD inline int64_t exponent_of(double v) {
  if (!(v > 0) || v > 1.7976931348623157e308) return 0;
  const double normal = v < 0x1p-1000 ? v * 0x1p60 : v;
  return static_cast<int64_t>((bit_cast<uint64_t>(normal) >> 52) & 2047u) - 1023 - (v < 0x1p-1000 ? 60 : 0);
}

// The accumulators of a lane joined.
template <int q, class R, int count>
FASTSAL_HD inline R join_all(const R (&sums)[count]) {
  if constexpr (count == 2) {
    return join<q>(sums[0], sums[1]);
  } else {
    return join<q>(join<q>(sums[0], sums[1]), join<q>(sums[2], sums[3]));
  }
}

// Whether the fold of a segment made in Real<T> lost nothing to overflow or underflow: an entry whose square underflows
// counts for nothing beside such a sum. If not, the segment is folded again in float64 or with scaled entries.
template <int q, class T>
FASTSAL_HD inline bool in_range(double fold) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  if (q == kL2) return fold >= (is_double ? 0x1p-900 : 0x1p-100) && fold <= (is_double ? 0x1p1000 : 0x1p120);
  return is_double || fold <= 0x1p120;
}

}  // namespace fastsal
