// What the 32 lanes of a warp, and the warps of a block, do together. Every order is fixed, except that the two
// operands of an addition may swap, which changes no bit.
#pragma once

#include <cuda_runtime.h>

#include "fastsal/nearest.h"
#include "folds.cuh"
#include "segments.cuh"

namespace fastsal {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarpSize); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / kWarpSize); }

__device__ __forceinline__ double exchange(double v, int distance) { return __shfl_xor_sync(kAllLanes, v, distance); }
__device__ __forceinline__ int64_t exchange(int64_t v, int distance) {
  return static_cast<int64_t>(__shfl_xor_sync(kAllLanes, static_cast<long long>(v), distance));
}
__device__ __forceinline__ Candidate exchange(const Candidate& c, int distance) {
  return {exchange(c.ratio, distance), exchange(c.margin, distance), exchange(c.index, distance)};
}
// The value of one lane, for all of them.
__device__ __forceinline__ double from_lane(double v, int lane) { return __shfl_sync(kAllLanes, v, lane); }
__device__ __forceinline__ int64_t from_lane(int64_t v, int lane) {
  return static_cast<int64_t>(__shfl_sync(kAllLanes, static_cast<long long>(v), lane));
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
  for (; distance > 0; distance /= 2) folds[0] = join<q>(folds[0], exchange(folds[0], distance));
  return folds[0];
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

// Joins the folds of all threads of the block; each has the result.
template <int q>
__device__ double join_block(double fold) {
  __shared__ double of_warp[kWarpSize];
  begin_unwritten(of_warp);
  fold = join_lanes<q>(fold);
  if (lane_id() == 0) of_warp[warp_id()] = fold;
  __syncthreads();
  fold = of_warp[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) fold = join<q>(fold, of_warp[warp]);
  __syncthreads();  // of_warp may be used again
  return fold;
}

__device__ __forceinline__ Candidate no_candidate() { return {INFINITY, INFINITY, INT64_MAX}; }

__device__ __forceinline__ Candidate nearest_of_warp(Candidate best) {
#pragma unroll 1  // these instructions run once and cold
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Candidate other = exchange(best, distance);
    if (is_nearer(other, best)) best = other;
  }
  return best;
}

// The nearest of the candidates of all threads of the block; each has the result.
__device__ inline Candidate nearest_of_block(Candidate best) {
  __shared__ Candidate of_warp[kWarpSize];
  begin_unwritten(of_warp);
  best = nearest_of_warp(best);
  if (lane_id() == 0) of_warp[warp_id()] = best;
  __syncthreads();
  best = lane_id() < static_cast<int>(blockDim.x) / kWarpSize ? of_warp[lane_id()] : no_candidate();
  __syncthreads();  // of_warp may be used again
  return nearest_of_warp(best);
}

}  // namespace fastsal
