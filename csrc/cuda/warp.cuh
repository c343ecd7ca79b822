// What the lanes of a warp do together. Every order is fixed: an addition's two operands may swap, which changes no
// bit.
#pragma once

#include <cuda_runtime.h>

#include "fastsal/lanes.h"

namespace fastsal {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kLanes); }

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
__device__ __forceinline__ F join_lanes(F fold, int lanes = kLanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) fold = join<q>(fold, exchange(fold, distance));
  return fold;
}

// join_lanes of several folds at once: half of the folds go to the other half of the lanes in each of the first rounds,
// so that 4 folds take 6 exchanges and not 20. Lane l ends with fold `row_of_lane<count>(l)`.
template <int q, int count>
__device__ __forceinline__ double join_lanes(double (&folds)[count]) {
  int distance = kLanes / 2;
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
  return lane / (kLanes / count);
}

// The adjacent entries that a lane loads at once; those from `left` on count as 0.
template <class T>
struct Pack {
  T entries[Layout<T>::kPack];
};
template <bool aligned, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, int left) {
  Pack<T> pack;
  if constexpr (aligned) {  // and the row's length is a multiple of a pack
    const uint4 words = left > 0 ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
    memcpy(&pack, &words, sizeof(pack));
  } else {
#pragma unroll
    for (int c = 0; c < Layout<T>::kPack; ++c) {
      T zero{};
      pack.entries[c] = c < left ? from[c] : zero;
    }
  }
  return pack;
}

// The fold of `length` entries by the warp, without overflow or underflow: float64 holds the square of any narrower
// entry; entries of float64 are scaled by the largest.
template <int q, class T, class Entry>
__device__ Scaled fold_safely(int64_t length, Entry entry) {
  int64_t exponent = 0;
  if constexpr (q == 2 && sizeof(T) == sizeof(double)) {
    double top = 0;
    for (int64_t k = lane_id(); k < length; k += kLanes) top = fold<0>(top, entry(k));
    exponent = exponent_of(join_lanes<0>(top));
  }
  Running<q, double> sum;
  for (int64_t k = lane_id(); k < length; k += kLanes) {
    sum.add(fold<q>(0.0, exponent == 0 ? entry(k) : shift(entry(k), -exponent)));
  }
  return {join_lanes<q>(sum.total()), 2 * exponent};
}

// <x, v> over entries whose product may leave the range of float64: each term has its own exponent.
template <class X, class V>
__device__ Scaled dot_safely(int64_t length, X x_at, V v_at) {
  int64_t top = INT32_MIN;
  for (int64_t k = lane_id(); k < length; k += kLanes) {
    const int64_t e = exponent_of(magnitude(x_at(k))) + exponent_of(magnitude(v_at(k)));
    if (x_at(k) != 0 && v_at(k) != 0 && e > top) top = e;
  }
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const int64_t other = exchange(top, distance);
    top = other > top ? other : top;
  }
  Running<1, double> sum;
  for (int64_t k = lane_id(); k < length; k += kLanes) {
    const int64_t ex = exponent_of(magnitude(x_at(k))), ev = exponent_of(magnitude(v_at(k)));
    const double term = shift(x_at(k), -ex) * shift(v_at(k), -ev);
    sum.add(term == 0 ? 0 : shift(term, ex + ev - top));
  }
  const double total = join_lanes<1>(sum.total());
  return {total, total == 0 ? 0 : top};
}

// The entry of x, which comes in the Jacobian's type T or in float32.
template <class T>
struct Input {
  const void* first;
  bool is_float;
  __device__ double operator()(int64_t k) const {
    return is_float ? static_cast<const float*>(first)[k] : real(static_cast<const T*>(first)[k]);
  }
};

__device__ __forceinline__ Candidate exchange(const Candidate& c, int distance) {
  return {exchange(c.ratio, distance), exchange(c.margin, distance), exchange(c.index, distance)};
}

// The nearest of candidates 0 to n - 1, for all threads of the block; index -1 is no candidate.
template <class CandidateOf>
__device__ Candidate block_nearest(int64_t n, CandidateOf candidate_of) {
  __shared__ Candidate of_warp[kLanes];
  const Candidate none = {INFINITY, INFINITY, INT64_MAX};
  Candidate best = none;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const Candidate other = candidate_of(j);
    if (other.index >= 0 && is_nearer(other, best)) best = other;
  }
  for (int round = 0; round < 2; ++round) {  // within the warps, then among them
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const Candidate other = exchange(best, distance);
      if (is_nearer(other, best)) best = other;
    }
    if (round == 1) break;
    if (lane_id() == 0) of_warp[threadIdx.x / kLanes] = best;
    __syncthreads();
    best = lane_id() < static_cast<int>(blockDim.x) / kLanes ? of_warp[lane_id()] : none;
  }
  __syncthreads();  // of_warp may be used again
  return best;
}

}  // namespace fastsal
