// Stage 2: the sums over the two winning rows and x, in float64, by slices of D.
#pragma once

#include <type_traits>

#include "loads.cuh"
#include "scaled_folds.cuh"

namespace fastsal {

// The saliency g, the runner-up's row and x of one example. d = g - other is formed entry by entry, and never
// <x, g> - <x, other>, which loses everything where the rows are nearly the same.
template <class T>
struct WinningRows {
  static constexpr int kPack = Layout<T>::kPack;
  const T* g;
  const T* other;
  Input<T> x;
  bool rows_aligned, x_aligned;

  __device__ WinningRows(const T* g, const T* other, Input<T> x, int64_t D)
      : g(g),
        other(other),
        x(x),
        rows_aligned(is_aligned(reinterpret_cast<uintptr_t>(g) | reinterpret_cast<uintptr_t>(other)) && D % kPack == 0),
        x_aligned(is_aligned(reinterpret_cast<uintptr_t>(x.first)) && D % kPack == 0) {}
  __device__ double g_at(int64_t k) const { return real(g[k]); }
  __device__ double d_at(int64_t k) const { return g_at(k) - static_cast<double>(real(other[k])); }
  // g and d of entries k to k + kPack - 1; those from `left` on are 0.
  template <bool aligned>
  __device__ __forceinline__ void load(int64_t k, int left, double (&g_out)[kPack], double (&d_out)[kPack]) const {
    constexpr Loads loads = aligned ? Loads::kAligned : Loads::kEntries;
    const Pack<T> a = load_pack<loads>(g + k, left), b = load_pack<loads>(other + k, left);
#pragma unroll
    for (int c = 0; c < kPack; ++c) {
      g_out[c] = real(a.entries[c]);
      d_out[c] = g_out[c] - static_cast<double>(real(b.entries[c]));
    }
  }
};

// TwoRowSums on the way: of one slice or of several, the norms without their roots. The cross term <g, d> is there
// where `has_cross` says so.
struct TwoRowFolds {
  Scaled dot_g, dot_d, g, d, x, cross;
};

template <int q>
constexpr int kPrimal = dual_norm(q);  // ‖x‖ is a p-norm
template <int q, class T>
constexpr bool has_cross = q == kL2 && sizeof(T) != sizeof(double);

// Whether the direction gap needs its pass over the rows, or follows from the cross term.
template <int q, class T>
__device__ bool needs_gap(const TwoRowSums& sums) {
  return !has_cross<q, T> || !(squared_gap(sums) > kSmallSquaredGap);
}

// One slice again, for sums that left the range of the fast path. Only float64 comes here: narrower entries cannot
// leave the range of float64.
template <int q, class T>
__device__ __noinline__ TwoRowFolds two_row_sums_again(WinningRows<T> rows, int64_t start, int length) {
  const auto x = [=](int64_t k) { return rows.x(start + k); };
  const auto g = [=](int64_t k) { return rows.g_at(start + k); };
  const auto d = [=](int64_t k) { return rows.d_at(start + k); };
  return {scaled_dot(length, x, g),
          scaled_dot(length, x, d),
          scaled_fold<q, T>(length, g),
          scaled_fold<q, T>(length, d),
          scaled_fold<kPrimal<q>, T>(length, x),
          {0, 0}};
}

// By one warp: the sums of one slice. `steps` steps have their loads on the way at once.
template <int q, class T, int steps = 2>
__device__ void two_rows_task(int64_t index, const WinningRows<T>& rows, int64_t D, TwoRowFolds* folds) {
  constexpr bool is_double = sizeof(T) == sizeof(double);
  constexpr int kPack = Layout<T>::kPack;
  const int64_t start = index * slice<T>(D);
  const int length = part_length(start, D, slice<T>(D)), offset = lane_id() * kPack;
  double dot_g = 0, dot_d = 0, g_fold = 0, d_fold = 0, x_fold = 0, cross = 0, size_g = 0, size_d = 0;
  // A branch between the loads of two steps would keep the second from going out with the first.
  const auto run = [&](auto aligned, auto entry_of_x) {
#pragma unroll steps
    for (int k = 0; k < length; k += Layout<T>::kStep) {
      double x[kPack], g[kPack], d[kPack];
      rows.x.template load<aligned.value, decltype(entry_of_x)>(start + k + offset, length - k - offset, x);
      rows.template load<aligned.value>(start + k + offset, length - k - offset, g, d);
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        dot_g = fma(x[c], g[c], dot_g);
        dot_d = fma(x[c], d[c], dot_d);
        g_fold = fold<q>(g_fold, g[c]);
        d_fold = fold<q>(d_fold, d[c]);
        x_fold = fold<kPrimal<q>>(x_fold, x[c]);
        if (has_cross<q, T>) cross = fma(g[c], d[c], cross);
        if (is_double) size_g = fold<kL1>(size_g, x[c] * g[c]), size_d = fold<kL1>(size_d, x[c] * d[c]);
      }
    }
  };
  const auto run_aligned = [&](auto entry_of_x) {
    if (rows.rows_aligned && rows.x_aligned) {
      run(std::true_type{}, entry_of_x);
    } else {
      run(std::false_type{}, entry_of_x);
    }
  };
  if constexpr (sizeof(T) < sizeof(float)) {
    if (rows.x.is_float) {
      run_aligned(0.0f);
    } else {
      run_aligned(T{});
    }
  } else {  // x has the type of the rows
    run_aligned(T{});
  }
  TwoRowFolds sums = {{join_lanes<kL1>(dot_g), 0},         {join_lanes<kL1>(dot_d), 0},
                      {join_lanes<q>(g_fold), 0},          {join_lanes<q>(d_fold), 0},
                      {join_lanes<kPrimal<q>>(x_fold), 0}, {has_cross<q, T> ? join_lanes<kL1>(cross) : 0, 0}};
  if constexpr (is_double) {
    const bool safe = in_range<kL2, T>(join_lanes<kL1>(size_g)) && in_range<kL2, T>(join_lanes<kL1>(size_d)) &&
                      in_range<q, T>(sums.g.value) && in_range<q, T>(sums.d.value) &&
                      in_range<kPrimal<q>, T>(sums.x.value);
    if (!safe) sums = two_row_sums_again<q, T>(rows, start, length);
  }
  if (lane_id() == 0) folds[index] = sums;
}

// By one warp: the sums over D from those of the slices. Every lane has the result. `batch` slices of a lane have their
// loads on the way at once.
template <int q, int batch>
__device__ __noinline__ TwoRowSums join_two_rows(const TwoRowFolds* folds, int64_t count) {
  TwoRowFolds all = {};
  for (int64_t first = lane_id(); first < count; first += batch * kWarpSize) {
    TwoRowFolds slices[batch];
#pragma unroll
    for (int c = 0; c < batch; ++c) {
      slices[c] = first + c * kWarpSize < count ? folds[first + c * kWarpSize] : TwoRowFolds{};
    }
#pragma unroll
    for (int c = 0; c < batch; ++c) {
      const TwoRowFolds& next = slices[c];
      all = {join<kL1>(all.dot_g, next.dot_g), join<kL1>(all.dot_d, next.dot_d), join<q>(all.g, next.g),
             join<q>(all.d, next.d),           join<kPrimal<q>>(all.x, next.x),  join<kL1>(all.cross, next.cross)};
    }
  }
  return {join_lanes<kL1>(all.dot_g),
          join_lanes<kL1>(all.dot_d),
          root<q>(join_lanes<q>(all.g)),
          root<q>(join_lanes<q>(all.d)),
          root<kPrimal<q>>(join_lanes<kPrimal<q>>(all.x)),
          join_lanes<kL1>(all.cross)};
}

// By one warp: the fold of d/‖d‖ - g/‖g‖ over one slice. Its entries are at most 2, so it needs no slow path.
template <int q, class T, int steps = 2>
__device__ void gap_task(int64_t index, const WinningRows<T>& rows, const TwoRowSums& totals, int64_t D, double* gaps) {
  constexpr int kPack = Layout<T>::kPack;
  const Unit g_unit = unit_of(totals.norm_g), d_unit = unit_of(totals.norm_d);
  const int64_t start = index * slice<T>(D);
  const int length = part_length(start, D, slice<T>(D)), offset = lane_id() * kPack;
  double sum = 0;
  const auto run = [&](auto aligned) {
#pragma unroll steps
    for (int k = 0; k < length; k += Layout<T>::kStep) {
      double g[kPack], d[kPack];
      rows.template load<aligned.value>(start + k + offset, length - k - offset, g, d);
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        if (sizeof(T) == sizeof(double)) g[c] *= g_unit.power, d[c] *= d_unit.power;  // 1 for all others
        const double entry = fma(d[c], d_unit.inverse, -(g[c] * g_unit.inverse));
        sum = k + offset + c < length ? fold<q>(sum, entry) : sum;  // 0 times an infinite inverse is NaN
      }
    }
  };
  if (rows.rows_aligned) {
    run(std::true_type{});
  } else {
    run(std::false_type{});
  }
  sum = join_lanes<q>(sum);
  if (lane_id() == 0) gaps[index] = sum;
}

// By one warp: the direction gap from the folds of the slices. Every lane has the result.
template <int q>
__device__ double join_gaps(const double* gaps, int64_t count) {
  double gap = 0;
  for (int64_t index = lane_id(); index < count; index += kWarpSize) gap = join<q>(gap, gaps[index]);
  gap = join_lanes<q>(gap);
  return q == kL2 ? sqrt(gap) : gap;
}

}  // namespace fastsal
