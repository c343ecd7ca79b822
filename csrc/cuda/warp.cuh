// What the 32 lanes of a warp, and the warps of a block, do together. Every order is fixed, except that the two
// operands of an addition may swap, which changes no bit.
#pragma once

#include <cuda_runtime.h>

#include "fastsal/nearest.h"
#include "folds.cuh"

namespace fastsal {

constexpr int kWarpSize = 32;  // lanes
constexpr unsigned kAllLanes = 0xffffffffu;

FASTSAL_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarpSize); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / kWarpSize); }

__device__ __forceinline__ double exchange(double v, int distance) { return __shfl_xor_sync(kAllLanes, v, distance); }
__device__ __forceinline__ Candidate exchange(const Candidate& c, int distance) {
  return {exchange(c.ratio, distance), exchange(c.margin, distance), __shfl_xor_sync(kAllLanes, c.index, distance)};
}

// Joins the folds of `lanes` neighbouring lanes; each of them has the result.
template <int q>
__device__ __forceinline__ double join_lanes(double fold, int lanes = kWarpSize) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) fold = join<q>(fold, exchange(fold, distance));
  return fold;
}

// Shared memory begins with any bits; in tests/cuda_emulation, with NaN.
template <class V>
__device__ __forceinline__ void begin_unwritten(V& shared) {
#if !defined(__CUDACC__)
  emulated_unwritten(&shared, sizeof(shared));
#endif
}

// Joins the values of `threads` neighbouring threads, a power of two; each has the result. Where these are more than a
// warp, they are the whole block.
template <class V, class Join>
__device__ V join_threads(V v, Join join, int threads) {
  __shared__ V of_warp[kWarpSize];
  begin_unwritten(of_warp);
  const auto of_lanes = [&](V value, int lanes) {
#pragma unroll 1  // these instructions run once and cold
    for (int distance = lanes / 2; distance > 0; distance /= 2) value = join(value, exchange(value, distance));
    return value;
  };
  v = of_lanes(v, threads < kWarpSize ? threads : kWarpSize);
  if (threads <= kWarpSize) return v;
  if (lane_id() == 0) of_warp[warp_id()] = v;
  __syncthreads();
  const int warps = threads / kWarpSize;
  v = of_warp[lane_id() % warps];
  __syncthreads();  // of_warp may be used again
  return of_lanes(v, warps);
}
// Of the threads that share threadIdx.y.
template <int q>
__device__ double join_threads(double fold) {
  return join_threads(fold, [](double a, double b) { return join<q>(a, b); }, static_cast<int>(blockDim.x));
}

__device__ __forceinline__ Candidate no_candidate() { return {INFINITY, INFINITY, INT64_MAX}; }

// The nearest of the candidates of `threads` neighbouring threads.
__device__ inline Candidate nearest_of_threads(const Candidate& best, int threads) {
  return join_threads(best, [](const Candidate& a, const Candidate& b) { return is_nearer(b, a) ? b : a; }, threads);
}

}  // namespace fastsal
