// Sums whose terms may leave the range of float64, by a whole block, entry by entry.
#pragma once

#include "fastsal/scaled.h"
#include "warp.cuh"

namespace fastsal {

// The parts 0 to length - 1 joined.
template <int q, class Part>
__device__ double join_parts(int64_t length, Part part) {
  double sum = 0;
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < length; k += blockDim.x) sum = join<q>(sum, part(k));
  return join_threads<q>(sum);
}

// The norm of `length` entries of float64, scaled by the largest where they are squared.
template <int q, class Entry>
__device__ Scaled scaled_norm(int64_t length, Entry entry) {
  int exponent = 0;
  if (q == kL2) {
    const double top = join_parts<kMax>(length, [&](int64_t k) { return std::fabs(entry(k)); });
    exponent = static_cast<int>(normalized({top, 0}).exponent);
  }
  const auto part = [&](int64_t k) { return fold<q>(0.0, exponent == 0 ? entry(k) : ldexp(entry(k), -exponent)); };
  return {root<q>(join_parts<q>(length, part)), exponent};
}

// <x, v> over entries of float64: each term has its own exponent, and they are added at that of the largest.
template <class X, class V>
__device__ Scaled scaled_dot(int64_t length, X x_at, V v_at) {
  constexpr int kOffset = 4096;  // makes every exponent positive, so that 0 is that of no term
  const auto term = [&](int64_t k) {
    const Scaled x = normalized({x_at(k), 0}), v = normalized({v_at(k), 0});
    return Scaled{x.value * v.value, x.value == 0 || v.value == 0 ? 0 : x.exponent + v.exponent + kOffset};
  };
  const double top = join_parts<kMax>(length, [&](int64_t k) { return static_cast<double>(term(k).exponent); });
  const double total = join_parts<kL1>(length, [&](int64_t k) {
    const Scaled t = term(k);
    return ldexp(t.value, static_cast<int>(t.exponent - top));
  });
  return {total, total == 0 ? 0 : static_cast<int64_t>(top) - kOffset};
}

}  // namespace fastsal
