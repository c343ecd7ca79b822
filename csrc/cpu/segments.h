// How the CPU backend cuts rows along D, and how the sums of the segments become one, in fixed order.
#pragma once

#include "fastsal/scaled.h"

namespace fastsal {

// D is cut into segments of this many elements whatever the batch or thread count: the reduction tree depends on D
// alone.
constexpr int64_t kSegment = 8192;

inline int64_t segments(int64_t D) { return (D + kSegment - 1) / kSegment; }

// How many entries the segment that begins at `start` has: fewer than the others where it is the last.
inline int64_t segment_length(int64_t start, int64_t D) { return D - start < kSegment ? D - start : kSegment; }

// The sum over D from the sums of its segments, in fixed order, and compensated, so that the number of segments costs
// no accuracy.
inline Scaled sum_segments(const Scaled* partial, int64_t count) {
  if (count == 1) return partial[0];
  double sum = 0, lost = 0;
  bool plain = true;
  for (int64_t s = 0; s < count; ++s) {
    const double v = partial[s].value, t = sum + v, back = t - sum;
    lost += (sum - (t - back)) + (v - back);
    sum = t;
    plain = plain && partial[s].exponent == 0;
  }
  if (plain && isfinite(sum)) return {sum + lost, 0};
  int64_t top = INT64_MIN;
  double naive = 0;
  bool finite = true;
  for (int64_t s = 0; s < count; ++s) {
    naive += partial[s].value;
    finite = finite && isfinite(partial[s].value);
    const Scaled p = normalized(partial[s]);
    if (p.value != 0 && p.exponent > top) top = p.exponent;
  }
  if (!finite) return {naive, 0};  // infinities and NaN as IEEE adds them
  if (top == INT64_MIN) return {0, 0};
  sum = lost = 0;
  for (int64_t s = 0; s < count; ++s) {
    const Scaled p = normalized(partial[s]);
    const double v = p.value == 0 ? 0 : ldexp(p.value, static_cast<int>(p.exponent - top));
    const double t = sum + v, back = t - sum;
    lost += (sum - (t - back)) + (v - back);
    sum = t;
  }
  return {sum + lost, top};
}

// The largest of partials, none of which is negative; NaN wins.
inline Scaled max_segments(const Scaled* partial, int64_t count) {
  Scaled best = partial[0];
  for (int64_t s = 1; s < count; ++s) {
    if (!(partial[s].value <= best.value) && !isnan(best.value)) best = partial[s];
  }
  return best;
}

// The q-norm from the folds of its segments: sums of squares (q = 2), sums of magnitudes (q = 1), or largest magnitudes
// (q = infinity; their exponents are 0).
inline Scaled norm_segments(int q, const Scaled* partial, int64_t count) {
  if (q == kMax) return max_segments(partial, count);
  Scaled s = sum_segments(partial, count);
  if (q == kL1) return s;
  if (s.exponent % 2 != 0) s = {s.value * 2, s.exponent - 1};
  return {sqrt(s.value), s.exponent / 2};
}

}  // namespace fastsal
