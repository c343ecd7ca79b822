// Entries in registers: the type that differences are formed in, and widening to it.
#pragma once

#include "fastsal/half.h"

namespace fastsal {

// The type that differences are formed in. A float32 difference of float32 entries is off by 6e-8 of itself at most.
template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

FASTSAL_HD inline float real(float v) { return v; }
FASTSAL_HD inline double real(double v) { return v; }
FASTSAL_HD inline float real(Half v) { return to_float(v); }
FASTSAL_HD inline float real(BFloat16 v) { return to_float(v); }

// Either of the two, for kernels that convert little.
struct Bits16 {
  uint16_t bits;
};
template <class T>
FASTSAL_HD inline Real<T> real(T v, bool) {
  return real(v);
}
FASTSAL_HD inline float real(Bits16 v, bool is_half) { return is_half ? real(Half{v.bits}) : real(BFloat16{v.bits}); }

}  // namespace fastsal
