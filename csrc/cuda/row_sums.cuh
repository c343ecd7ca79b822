// What one pass over the rows gives: sums over D of Δ_j = anchor - row j, for every row.
#pragma once

#include "launch.cuh"
#include "loads.cuh"
#include "warp.cuh"

namespace fastsal {

// Sums over D, or over a segment of it. The anchor's own row is taken as zero, so its Δ is the anchor.
struct RowSums {
  double norm;  // the fold of Δ_j, not yet its root
  double dot;   // <x, Δ_j>
  double last;  // of other rows <g, Δ_j>, for q = 2 only; of the anchor's own the fold of x, whose root is its p-norm
};

// The rows, and what they are subtracted from: row own[b] of each example, or, where `own` is null, an anchor.
struct RowSumsProblem {
  Vectors anchors;
  const int64_t* own_ptr;  // [B]
  Rows rows;
  Vectors x;
  Shape shape;
  RowSums* sums_ptr;  // [B, n, segments]
  int* arrived_ptr;   // [B], set to 0; or null

  __device__ Entries anchor(int64_t b) const { return own_ptr ? rows(b, own_ptr[b]) : anchors(b); }
};

// For rows of float16, bfloat16 and float32.
void launch_row_sums(const Stream& on, int norm, int dtype, const RowSumsProblem& problem);

// For rows of float64: ‖Δ_j‖_q of every row, [B, n], in the same places.
void launch_row_norms_double(const Stream& on, int norm, const RowSumsProblem& problem, double* norms_ptr);

// The sums of a row from those of its segments, by `lanes` neighbouring lanes, each with `batch` segments' loads in
// flight at once. A null `sums` is no row: its lanes have nothing to add, but take part in the exchanges, which want
// the whole warp.
template <int q, int batch = 4>
__device__ __forceinline__ RowSums join_segments(const RowSums* sums, int segments, int lanes) {
  RowSums all = {};
  for (int first = lane_id() & (lanes - 1); sums && first < segments; first += batch * lanes) {
    const RowSums* from = sums + first;
    RowSums next[batch];
#pragma unroll
    for (int c = 0; c < batch; ++c) next[c] = from[first + c * lanes < segments ? c * lanes : 0];  // without a branch
#pragma unroll
    for (int c = 0; c < batch; ++c) {
      if (first + c * lanes >= segments) continue;
      all = {join<q>(all.norm, next[c].norm), all.dot + next[c].dot, join<kPrimal<q>>(all.last, next[c].last)};
    }
  }
  return {join_lanes<q>(all.norm, lanes), join_lanes<kL1>(all.dot, lanes), join_lanes<kPrimal<q>>(all.last, lanes)};
}

}  // namespace fastsal
