// What one lane of a kernel does with the entries it is given: the arithmetic of stage 1, for host and device alike.
//
// Rows are cut into chunks of 4096 bytes (one warp's work). In a chunk, entry k belongs to a lane and to one of its
// accumulators by k alone, so that the sum of a chunk has the same bits however the row lies in memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fastsal/finalize.h"

namespace fastsal {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type a difference is formed in. float32 differences of float32 entries are off by 6e-8 of themselves at most.
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

// a >= 0 or NaN, b likewise: the larger, NaN above all. float32 as integers, since one comparison then sees NaN too.
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
  if constexpr (q == 0) {
    return larger(a, b);
  } else {
    return a + b;
  }
}

// The q-norm as a fold over entries: a sum of squares, a sum of magnitudes, or the largest magnitude (q = 0 is
// infinity).
template <int q, class R>
FASTSAL_HD inline R fold(R sum, R entry) {
  if constexpr (q == 2) {
    return multiply_add(entry, entry, sum);
  } else {
    return join<q>(sum, magnitude(entry));
  }
}

// v * 2^exponent; in steps, since 2^exponent itself may lie outside the range of float64.
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

// The norm of a complete fold; exponents of sums of squares are even.
template <int q>
FASTSAL_HD inline Scaled root(Scaled fold) {
  return q == 2 ? Scaled{sqrt(fold.value), fold.exponent / 2} : fold;
}

// A fold of many parts. Sums keep what rounding loses (Knuth's two-sum), so that neither the number of parts nor
// float32 shows; this costs six float32 additions where a flush to float64 would wait for a consumer GPU's few float64
// units.
template <int q, class R>
struct Running {
  R sum = 0, lost = 0;
  FASTSAL_HD inline void add(R part) {
    if constexpr (q == 0) {
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

// A chunk, and who gets which entry of it.
constexpr int kLanes = 32;
constexpr int kPackBytes = 16;
constexpr int kChunkBytes = 4096;
template <class T>
struct Layout {
  static constexpr int kPack = kPackBytes / sizeof(T);         // adjacent entries that a lane loads at once
  static constexpr int kStep = kPack * kLanes;                 // entries that the warp loads at once
  static constexpr int kChunk = kChunkBytes / sizeof(T);       // at most 16 additions to a float32 accumulator
  static constexpr int kAccumulators = kPack < 4 ? kPack : 4;  // entry c of a pack goes to accumulator c % 4
};
FASTSAL_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
FASTSAL_HD inline int64_t chunks(int64_t D) {
  return ceil_div(D, Layout<T>::kChunk);
}

// A lane's accumulators joined.
template <int q, class R, int count>
FASTSAL_HD inline R join_all(const R (&sums)[count]) {
  if constexpr (count == 2) {
    return join<q>(sums[0], sums[1]);
  } else {
    return join<q>(join<q>(sums[0], sums[1]), join<q>(sums[2], sums[3]));
  }
}

// Whether the fold of a chunk made in Real<T> lost nothing to overflow or underflow: an entry whose square underflows
// counts for nothing beside such a sum. If not, the chunk is folded again in float64 or with scaled entries.
template <int q, class T>
FASTSAL_HD inline bool in_range(double fold) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  if (q == 2) return fold >= (is_double ? 0x1p-900 : 0x1p-100) && fold <= (is_double ? 0x1p1000 : 0x1p120);
  return is_double || fold <= 0x1p120;
}

// How many lanes join the folds of a row's chunks: lane i takes chunks i, i + lanes, ..., then neighbours pair up.
FASTSAL_HD inline int joining_lanes(int64_t chunks) {
  int lanes = 1;
  while (lanes < kLanes && lanes * 4 < chunks) lanes *= 2;
  return lanes;
}

}  // namespace fastsal
