// The slow path of the folds, by a whole warp: sums that leave the range of the type they are usually made in.
#pragma once

#include "warp.cuh"

namespace fastsal {

// The fold of `length` entries by the warp, without overflow or underflow: float64 holds the square of any narrower
// entry; entries of float64 are scaled by the largest.
template <int q, class T, class Entry>
__device__ Scaled scaled_fold(int64_t length, Entry entry) {
  int64_t exponent = 0;
  if constexpr (q == kL2 && sizeof(T) == sizeof(double)) {
    double top = 0;
    for (int64_t k = lane_id(); k < length; k += kWarpSize) top = fold<kMax>(top, entry(k));
    exponent = exponent_of(join_lanes<kMax>(top));
  }
  Running<q, double> sum;
  for (int64_t k = lane_id(); k < length; k += kWarpSize) {
    sum.add(fold<q>(0.0, exponent == 0 ? entry(k) : shift(entry(k), -exponent)));
  }
  return {join_lanes<q>(sum.total()), 2 * exponent};
}

// <x, v> over entries whose product may leave the range of float64: each term has its own exponent.
template <class X, class V>
__device__ Scaled scaled_dot(int64_t length, X x_at, V v_at) {
  int64_t top = INT32_MIN;
  for (int64_t k = lane_id(); k < length; k += kWarpSize) {
    const int64_t e = exponent_of(magnitude(x_at(k))) + exponent_of(magnitude(v_at(k)));
    if (x_at(k) != 0 && v_at(k) != 0 && e > top) top = e;
  }
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const int64_t other = exchange(top, distance);
    top = other > top ? other : top;
  }
  Running<kL1, double> sum;
  for (int64_t k = lane_id(); k < length; k += kWarpSize) {
    const int64_t ex = exponent_of(magnitude(x_at(k))), ev = exponent_of(magnitude(v_at(k)));
    const double term = shift(x_at(k), -ex) * shift(v_at(k), -ev);
    sum.add(term == 0 ? 0 : shift(term, ex + ev - top));
  }
  const double total = join_lanes<kL1>(sum.total());
  return {total, total == 0 ? 0 : top};
}

}  // namespace fastsal
