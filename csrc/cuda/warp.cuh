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

// join_lanes of several folds at once: half of the folds go to the other half of the lanes in each of the first rounds,
// so that 4 folds take 6 exchanges and not 20. Lane l ends with fold `row_of_lane<count>(l)`.
template <int q, int count>
__device__ __forceinline__ double join_lanes(double (&folds)[count]) {
  int distance = kWarpSize / 2;
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = lane_id() & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const double kept = upper ? folds[i + half] : folds[i], sent = upper ? folds[i] : folds[i + half];
      folds[i] = join<q>(kept, exchange(sent, distance));
    }
  }
  return join_lanes<q>(folds[0], 2 * distance);
}
template <int count>
__device__ __forceinline__ int row_of_lane(int lane) {
  return lane / (kWarpSize / count);
}

// Shared memory begins with any bits; in tests/cuda_emulation, with NaN.
template <class V>
__device__ __forceinline__ void begin_unwritten(V& shared) {
#if !defined(__CUDACC__)
  emulated_unwritten(&shared, sizeof(shared));
#endif
}

// Joins the values of all threads of the block, whose warps are a power of two; each has the result.
template <class V, class Join>
__device__ V join_threads(V v, Join join) {
  __shared__ V of_warp[kWarpSize];
  begin_unwritten(of_warp);
  const auto of_lanes = [&](V value, int lanes) {
#pragma unroll 1  // these instructions run once and cold
    for (int distance = lanes / 2; distance > 0; distance /= 2) value = join(value, exchange(value, distance));
    return value;
  };
  v = of_lanes(v, kWarpSize);
  if (lane_id() == 0) of_warp[warp_id()] = v;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  v = of_warp[lane_id() % warps];
  __syncthreads();  // of_warp may be used again
  return of_lanes(v, warps);
}
template <int q>
__device__ double join_block(double fold) {
  return join_threads(fold, [](double a, double b) { return join<q>(a, b); });
}

__device__ __forceinline__ Candidate no_candidate() { return {INFINITY, INFINITY, INT64_MAX}; }

// The nearest of the candidates of all threads of the block; each has the result.
__device__ inline Candidate nearest_of_block(const Candidate& best) {
  return join_threads(best, [](const Candidate& a, const Candidate& b) { return is_nearer(b, a) ? b : a; });
}

}  // namespace fastsal
