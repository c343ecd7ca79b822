// A number with an exponent of its own, since a sum over D may lie outside the range of double. The fast paths leave
// the exponent at 0.
#pragma once

#include <math.h>
#include <stdint.h>

#include "fastsal/types.h"

namespace fastsal {

// value * 2^exponent
struct Scaled {
  double value;
  int64_t exponent;
};

FASTSAL_HD inline double to_double(Scaled s) {
  return s.exponent == 0 ? s.value : ldexp(s.value, static_cast<int>(s.exponent));
}

// Whether s has no exponent and is far enough from both ends of double for any one product or quotient.
FASTSAL_HD inline bool is_plain(Scaled s) {
  const double v = fabs(s.value);
  return s.exponent == 0 && (v == 0 || (v > 0x1p-500 && v < 0x1p500));
}

// The same number with a value between 0.5 and 1 in magnitude, where it is finite and not 0.
FASTSAL_HD inline Scaled normalized(Scaled s) {
  if (s.value == 0 || !isfinite(s.value)) return {s.value, 0};
  int e;
  const double v = frexp(s.value, &e);
  return {v, s.exponent + e};
}

// Brings a and b to one exponent, that of the larger.
FASTSAL_HD inline void align(Scaled& a, Scaled& b) {
  if (is_plain(a) && is_plain(b)) return;
  a = normalized(a);
  b = normalized(b);
  const int64_t e = a.value == 0 ? b.exponent : b.value == 0 || a.exponent > b.exponent ? a.exponent : b.exponent;
  a = {ldexp(a.value, static_cast<int>(a.exponent - e)), e};
  b = {ldexp(b.value, static_cast<int>(b.exponent - e)), e};
}

}  // namespace fastsal
