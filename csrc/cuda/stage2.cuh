// Stage 2: the sums over the two winning rows and x, in float64 and over the same segments as stage 1.
#pragma once

#include "loads.cuh"
#include "scaled_folds.cuh"

namespace fastsal {

// The saliency g, the runner-up's row and x of one example. d = g - other is formed entry by entry, and never
// <x, g> - <x, other>, which loses everything where the rows are nearly the same.
template <class T>
struct WinningRows {
  const T* g;
  const T* other;
  Input<T> x;
  __device__ double g_at(int64_t k) const { return real(g[k]); }
  __device__ double d_at(int64_t k) const { return g_at(k) - static_cast<double>(real(other[k])); }
};

// TwoRowSums on the way: of one segment or of several, the norms without their roots.
struct TwoRowFolds {
  Scaled dot_g, dot_d, g, d, x;
};

template <int q>
constexpr int kPrimal = dual_norm(q);  // ‖x‖ is a p-norm

// One segment again, for sums that left the range of the fast path. Only float64 comes here: narrower entries cannot
// leave the range of float64.
template <int q, class T>
__device__ __noinline__ TwoRowFolds two_row_sums_again(WinningRows<T> rows, int64_t start, int length) {
  const auto x = [=](int64_t k) { return rows.x(start + k); };
  const auto g = [=](int64_t k) { return rows.g_at(start + k); };
  const auto d = [=](int64_t k) { return rows.d_at(start + k); };
  return {scaled_dot(length, x, g), scaled_dot(length, x, d), scaled_fold<q, T>(length, g),
          scaled_fold<q, T>(length, d), scaled_fold<kPrimal<q>, T>(length, x)};
}

// By one warp: the sums of one segment.
template <int q, class T>
__device__ void two_rows_task(int64_t segment, const WinningRows<T>& rows, int64_t D, TwoRowFolds* folds) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  const int64_t start = segment * Layout<T>::kSegment;
  const int length = segment_length<T>(start, D);
  double dot_g = 0, dot_d = 0, g_fold = 0, d_fold = 0, x_fold = 0, size_g = 0, size_d = 0;
#pragma unroll 4
  for (int k = lane_id(); k < length; k += kWarpSize) {
    const double x = rows.x(start + k), g = rows.g_at(start + k), d = rows.d_at(start + k);
    dot_g = fma(x, g, dot_g);
    dot_d = fma(x, d, dot_d);
    g_fold = fold<q>(g_fold, g);
    d_fold = fold<q>(d_fold, d);
    x_fold = fold<kPrimal<q>>(x_fold, x);
    if (is_double) size_g = fold<kL1>(size_g, x * g), size_d = fold<kL1>(size_d, x * d);
  }
  TwoRowFolds sums = {{join_lanes<kL1>(dot_g), 0},
                      {join_lanes<kL1>(dot_d), 0},
                      {join_lanes<q>(g_fold), 0},
                      {join_lanes<q>(d_fold), 0},
                      {join_lanes<kPrimal<q>>(x_fold), 0}};
  if constexpr (is_double) {
    const bool safe = in_range<kL2, T>(join_lanes<kL1>(size_g)) && in_range<kL2, T>(join_lanes<kL1>(size_d)) &&
                      in_range<q, T>(sums.g.value) && in_range<q, T>(sums.d.value) &&
                      in_range<kPrimal<q>, T>(sums.x.value);
    if (!safe) sums = two_row_sums_again<q, T>(rows, start, length);
  }
  if (lane_id() == 0) folds[segment] = sums;
}

// By one warp: the sums over D from those of the segments. Every lane has the result.
template <int q>
__device__ __noinline__ TwoRowSums join_two_rows(const TwoRowFolds* folds, int64_t segments) {
  TwoRowFolds all = {};
  for (int64_t segment = lane_id(); segment < segments; segment += kWarpSize) {
    const TwoRowFolds& next = folds[segment];
    all = {join<kL1>(all.dot_g, next.dot_g), join<kL1>(all.dot_d, next.dot_d), join<q>(all.g, next.g),
           join<q>(all.d, next.d), join<kPrimal<q>>(all.x, next.x)};
  }
  return {join_lanes<kL1>(all.dot_g), join_lanes<kL1>(all.dot_d), root<q>(join_lanes<q>(all.g)),
          root<q>(join_lanes<q>(all.d)), root<kPrimal<q>>(join_lanes<kPrimal<q>>(all.x))};
}

// By one warp: the fold of d/‖d‖ - g/‖g‖ over one segment. Its entries are at most 2, so it needs no slow path.
template <int q, class T>
__device__ void gap_task(int64_t segment, const WinningRows<T>& rows, const TwoRowSums& totals, int64_t D,
                         double* gaps) {
  const Unit g_unit = unit_of(totals.norm_g), d_unit = unit_of(totals.norm_d);
  const int64_t start = segment * Layout<T>::kSegment;
  const int length = segment_length<T>(start, D);
  double sum = 0;
#pragma unroll 4
  for (int k = lane_id(); k < length; k += kWarpSize) {
    const double g = rows.g_at(start + k) * g_unit.power * g_unit.inverse;
    const double d = rows.d_at(start + k) * d_unit.power * d_unit.inverse;
    sum = fold<q>(sum, d - g);
  }
  sum = join_lanes<q>(sum);
  if (lane_id() == 0) gaps[segment] = sum;
}

// By one warp: the direction gap from the folds of the segments. Every lane has the result.
template <int q>
__device__ double join_gaps(const double* gaps, int64_t segments) {
  double gap = 0;
  for (int64_t segment = lane_id(); segment < segments; segment += kWarpSize) gap = join<q>(gap, gaps[segment]);
  gap = join_lanes<q>(gap);
  return q == kL2 ? sqrt(gap) : gap;
}

}  // namespace fastsal
