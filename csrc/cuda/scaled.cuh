// Sums whose terms may leave the range of float64, by a whole warp or a whole block, entry by entry.
#pragma once

#include "fastsal/scaled.h"
#include "warp.cuh"

namespace fastsal {

// Who shares a sum: thread `first()` takes entries first(), first() + step(), ...
struct Warp {
  static __device__ int first() { return lane_id(); }
  static __device__ int step() { return kWarpSize; }
  template <int q>
  static __device__ double join(double fold) {
    return join_lanes<q>(fold);
  }
};
struct Block {
  static __device__ int first() { return static_cast<int>(threadIdx.x); }
  static __device__ int step() { return static_cast<int>(blockDim.x); }
  template <int q>
  static __device__ double join(double fold) {
    return join_block<q>(fold);
  }
};

// v * 2^exponent, in steps, since 2^exponent itself may lie outside the range of float64.
FASTSAL_HD inline double shift(double v, int64_t exponent) {
  exponent = exponent < -3000 ? -3000 : exponent > 3000 ? 3000 : exponent;
  const int64_t third = exponent / 3;
  const int64_t steps[3] = {third, third, exponent - 2 * third};
  for (int64_t step : steps) v *= bit_cast<double>(static_cast<uint64_t>(step + 1023) << 52);
  return v;
}

// e with 2^e <= v < 2^(e+1); 0 for zero, NaN and infinity.
FASTSAL_HD inline int64_t exponent_of(double v) {
  if (!(v > 0) || v > 1.7976931348623157e308) return 0;
  const double normal = v < 0x1p-1000 ? v * 0x1p60 : v;
  return static_cast<int64_t>((bit_cast<uint64_t>(normal) >> 52) & 2047u) - 1023 - (v < 0x1p-1000 ? 60 : 0);
}

// The parts 0 to length - 1 joined.
template <int q, class Team, class Part>
__device__ double join_parts(int64_t length, Part part) {
  Running<q, double> sum;
  for (int64_t k = Team::first(); k < length; k += Team::step()) sum.add(part(k));
  return Team::template join<q>(sum.total());
}

// The norm of `length` entries of float64, scaled by the largest where they are squared.
template <int q, class Team, class Entry>
__device__ Scaled scaled_norm(int64_t length, Entry entry) {
  int64_t exponent = 0;
  if (q == kL2) exponent = exponent_of(join_parts<kMax, Team>(length, [&](int64_t k) { return magnitude(entry(k)); }));
  const auto part = [&](int64_t k) { return fold<q>(0.0, exponent == 0 ? entry(k) : shift(entry(k), -exponent)); };
  return {root<q>(join_parts<q, Team>(length, part)), exponent};
}

// <x, v> over entries of float64: each term has its own exponent, and they are added at that of the largest.
template <class Team, class X, class V>
__device__ Scaled scaled_dot(int64_t length, X x_at, V v_at) {
  constexpr int kOffset = 4096;  // makes every exponent positive, so that 0 is that of no term
  const auto exponent = [&](int64_t k) {
    return exponent_of(magnitude(x_at(k))) + exponent_of(magnitude(v_at(k))) + kOffset;
  };
  const double top = join_parts<kMax, Team>(
      length, [&](int64_t k) { return x_at(k) != 0 && v_at(k) != 0 ? static_cast<double>(exponent(k)) : 0; });
  const double total = join_parts<kL1, Team>(length, [&](int64_t k) {
    const int64_t ex = exponent_of(magnitude(x_at(k))), ev = exponent_of(magnitude(v_at(k)));
    const double term = shift(x_at(k), -ex) * shift(v_at(k), -ev);
    return term == 0 ? 0 : shift(term, exponent(k) - static_cast<int64_t>(top));
  });
  return {total, total == 0 ? 0 : static_cast<int64_t>(top) - kOffset};
}

}  // namespace fastsal
