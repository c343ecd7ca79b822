// Entries in registers: the type that differences are formed in, widening to it, and rounding on the way back.
#pragma once

#include <cstring>

#include "fastsal/types.h"

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

template <class To, class From>
FASTSAL_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FASTSAL_HD inline float real(float v) { return v; }
FASTSAL_HD inline double real(double v) { return v; }
FASTSAL_HD inline float real(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
FASTSAL_HD inline float real(Half v) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
#endif
}

// A value of a result or a gradient, rounded to nearest even.
FASTSAL_HD inline void store(double* to, double v) { *to = v; }
FASTSAL_HD inline void store(float* to, double v) { *to = static_cast<float>(v); }
FASTSAL_HD inline void store(BFloat16* to, double v) {
  const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(v));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
FASTSAL_HD inline void store(Half* to, double v) {
  const float f = static_cast<float>(v);
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(f));
#else
  const uint32_t bits = bit_cast<uint32_t>(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 2^-1 leaves its 10 bits in the low end of the mantissa
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
#endif
}

}  // namespace fastsal
