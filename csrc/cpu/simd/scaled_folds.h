// The slow path: folds and dot products of any range, scalar and in double, for the rare segment that leaves the range
// of the vectors.
#pragma once

#include "folds.h"

// A sum that is flushed every 64 additions, as vectors are, so that a long sum of equal terms does not drift.
struct FlushedSum {
  double total = 0, recent = 0;
  int count = 0;
  void add(double v) {
    recent += v;
    if (++count == 64) {
      total += recent;
      recent = count = 0;
    }
  }
  double value() const { return total + recent; }
};

// 2^e as two factors, each of which is in the range of double.
struct Power {
  double first, second;
  explicit Power(int64_t e)
      : first(__builtin_ldexp(1.0, static_cast<int>(e / 2))),
        second(__builtin_ldexp(1.0, static_cast<int>(e - e / 2))) {}
};

// The fold of the entries get(0) to get(len - 1), which are scaled by the largest of them.
template <int Q, class Get>
static Scaled scaled_fold(const Get& get, int64_t len) {
  double top = 0;
  for (int64_t k = 0; k < len; ++k) {
    const double v = __builtin_fabs(get(k));
    if (!(v <= top) && top == top) top = v;
  }
  if (top == 0 || !__builtin_isfinite(top) || Q == kMax) return {top, 0};
  const int64_t e = __builtin_ilogb(top);
  const Power down(-e);
  FlushedSum sum;
  for (int64_t k = 0; k < len; ++k) {
    const double v = __builtin_fabs(get(k)) * down.first * down.second;
    sum.add(Q == kL2 ? v * v : v);
  }
  return {sum.value(), Q == kL2 ? 2 * e : e};
}

// <x, v>; every term has an exponent of its own.
template <class GetX, class GetV>
static Scaled scaled_dot(const GetX& x, const GetV& v, int64_t len) {
  constexpr int64_t kNone = -(1 << 20);
  int64_t top = kNone;
  double special = 0;
  bool finite = true;
  for (int64_t k = 0; k < len; ++k) {
    const double a = x(k), b = v(k);
    if (!__builtin_isfinite(a) || !__builtin_isfinite(b)) {
      special += a * b;
      finite = false;
    } else if (a != 0 && b != 0) {
      const int64_t e = static_cast<int64_t>(__builtin_ilogb(a)) + __builtin_ilogb(b);
      if (e > top) top = e;
    }
  }
  if (!finite) return {special, 0};
  if (top == kNone) return {0, 0};
  FlushedSum sum;
  for (int64_t k = 0; k < len; ++k) {
    int ea, eb;
    const double a = __builtin_frexp(x(k), &ea), b = __builtin_frexp(v(k), &eb);
    if (a != 0 && b != 0) sum.add(__builtin_ldexp(a * b, static_cast<int>(ea + eb - top)));
  }
  return {sum.value(), top};
}

// Whether a sum of `len` terms did not overflow, and is so large that what underflow took from its terms does not show.
// Underflow is taken to flush to zero.
static inline bool in_range(double sum, int64_t len, double tiny) {
  const double v = sum < 0 ? -sum : sum;
  return v >= static_cast<double>(len) * tiny && v <= __DBL_MAX__;
}
static inline bool all_in_range(const double* four, int64_t len, double tiny) {
  typedef VectorsOf<kBytes == 16 ? 2 : 4>::D V;
  bool all = true;
  for (int k = 0; k < 4; k += sizeof(V) / sizeof(double)) {
    const V v = magnitude(load_vector<V>(four + k));
    const auto holds = (v >= static_cast<double>(len) * tiny) & (v <= __DBL_MAX__);
    for (unsigned l = 0; l < sizeof(V) / sizeof(double); ++l) all = all & (holds[l] != 0);
  }
  return all;
}
constexpr double kTinyFloat = 0x1p-100, kTinyDouble = 0x1p-960;
