// float16 and bfloat16 to float, which is exact, and back, rounded to nearest even; a NaN stays a NaN. No step depends
// on a subnormal float, which the processor may flush to zero.
#pragma once

#include <stdint.h>
#include <string.h>

#include "fastsal/types.h"

namespace fastsal {

template <class To, class From>
FASTSAL_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FASTSAL_HD inline float to_float(BFloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
FASTSAL_HD inline float to_float(Half v) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
#else
  // The exponent is shifted as an integer. A subnormal is given an exponent bit that a subtraction takes off again.
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(normal + (1u << 23)) - bit_cast<float>(113u << 23));
  const uint32_t bits = exponent == 0 ? small : exponent == 0x0f800000u ? normal + (112u << 23) : normal;
  return bit_cast<float>(bits | (v.bits & 0x8000u) << 16);
#endif
}

FASTSAL_HD inline BFloat16 to_bfloat16(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

FASTSAL_HD inline Half to_float16(float v) {
#if defined(__CUDA_ARCH__)
  Half out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
#else
  const uint32_t bits = bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) return {0x7e00u};
  if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 2^-1 leaves its 10 bits in the low end of the mantissa
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace fastsal
