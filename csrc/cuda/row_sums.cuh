// What one pass over the rows gives: sums over D of Δ_j = anchor - row j, for every row.
#pragma once

namespace fastsal {

// Sums over D, or over a segment of it. The anchor's own row is taken as zero, so its Δ is the anchor.
struct RowSums {
  double norm;  // the fold of Δ_j; over all of D its root, ‖Δ_j‖_q
  double dot;   // <x, Δ_j>
  double last;  // of other rows <g, Δ_j>, for q = 2 only; of the anchor's own the fold of x, whose root is its p-norm
};

}  // namespace fastsal
