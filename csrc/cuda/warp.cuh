// What the 32 lanes of a warp do together. Every order is fixed, except that the two operands of an addition may swap,
// which changes no bit.
#pragma once

#include <cuda_runtime.h>

#include "fastsal/nearest.h"
#include "folds.cuh"
#include "segments.cuh"

namespace fastsal {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarpSize); }

__device__ __forceinline__ double exchange(double v, int distance) { return __shfl_xor_sync(kAllLanes, v, distance); }
__device__ __forceinline__ int64_t exchange(int64_t v, int distance) {
  return static_cast<int64_t>(__shfl_xor_sync(kAllLanes, static_cast<long long>(v), distance));
}
__device__ __forceinline__ Scaled exchange(Scaled v, int distance) {
  return {exchange(v.value, distance), exchange(v.exponent, distance)};
}

__device__ __forceinline__ char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 bytes[];
  return reinterpret_cast<char*>(bytes);
#else
  return emulated_shared();  // tests/cuda_emulation
#endif
}

// Joins the folds of `lanes` neighbouring lanes; each of them has the result.
template <int q, class F>
__device__ __forceinline__ F join_lanes(F fold, int lanes = kWarpSize) {
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

__device__ __forceinline__ Candidate exchange(const Candidate& c, int distance) {
  return {exchange(c.ratio, distance), exchange(c.margin, distance), exchange(c.index, distance)};
}

// The nearest of candidates 0 to n - 1, for all threads of the block; index -1 is no candidate.
template <class CandidateOf>
__device__ Candidate block_nearest(int64_t n, CandidateOf candidate_of) {
  __shared__ Candidate of_warp[kWarpSize];
  const Candidate none = {INFINITY, INFINITY, INT64_MAX};
  Candidate best = none;
  constexpr int kBatch = 4;  // candidates whose loads are on the way at once
  for (int64_t first = threadIdx.x; first < n; first += kBatch * static_cast<int64_t>(blockDim.x)) {
    Candidate others[kBatch];
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      const int64_t j = first + c * static_cast<int64_t>(blockDim.x);
      others[c] = candidate_of(j < n ? j : first);  // a branch would keep the next one's loads from going out
      if (j >= n) others[c].index = -1;
    }
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      const bool nearer = is_nearer(others[c], best);  // whatever the index, so that its loads go out with the others
      if (nearer & (others[c].index >= 0)) best = others[c];
    }
  }
  for (int round = 0; round < 2; ++round) {  // within the warps, then among them
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      const Candidate other = exchange(best, distance);
      if (is_nearer(other, best)) best = other;
    }
    if (round == 1) break;
    if (lane_id() == 0) of_warp[threadIdx.x / kWarpSize] = best;
    __syncthreads();
    best = lane_id() < static_cast<int>(blockDim.x) / kWarpSize ? of_warp[lane_id()] : none;
  }
  __syncthreads();  // of_warp may be used again
  return best;
}

}  // namespace fastsal
