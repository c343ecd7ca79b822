// The operators behind fastsal._cuda. Device pointers and the stream come as integers.
//
// Logits and results are float64 where the Jacobian is, else float32, and contiguous. Everything runs on the current
// device. `scratch` has the bytes that <operator>_scratch says.
#pragma once

#include <string>

#include "tensors.h"

namespace fastsal {

std::string why_not();  // why the current device cannot run the kernels; empty if it can
int runtime_version();  // of the CUDA runtime linked in: 13000 is 13.0

// Sums over D, or over a segment of it, of Δ_j = anchor - row j. Where the row is the anchor itself, its Δ is the
// anchor.
struct RowSums {
  double norm;  // the fold of Δ_j; over all of D its root, ‖Δ_j‖_q
  double dot;   // <x, Δ_j>
  double last;  // for q = 2 <anchor, Δ_j>; of the anchor itself the fold of x, whose root is its p-norm
};

// These for every row, where the anchor is the row of class `own` [B], or x where `own` is 0. `sums` are
// [B, n, sum_segments]; the first segment's become those of the row. Of float64 only the norm is wanted.
int sum_segments(const Inputs& in);
void row_sums(const Inputs& in, uintptr_t own, uintptr_t sums, uintptr_t stream);

// From `sums` as row_sums leaves them where `own` are the predictions, which `indices` [2, B] holds already.
void margin_geometry(const Inputs& in, uintptr_t sums, uintptr_t logits, uintptr_t scalars, uintptr_t indices,
                     uintptr_t distances, uintptr_t stream);

int64_t pairwise_margins_scratch(const Inputs& in);
void pairwise_margins(const Inputs& in, uintptr_t scratch, uintptr_t logits, uintptr_t distance, uintptr_t margin,
                      uintptr_t nearest_margin, uintptr_t nearest, uintptr_t projection, uintptr_t stream);

// From w, v (float64 [B, n, n]; v 0 is none), as fastsal.tensor.reference.pairwise_backward defines it. The gradients
// have the dtypes of the Jacobian and of x.
int64_t pairwise_backward_scratch(const Inputs& in);
void pairwise_backward(const Inputs& in, uintptr_t scratch, uintptr_t w, uintptr_t v, uintptr_t grad_jacobian,
                       uintptr_t grad_x, uintptr_t stream);

}  // namespace fastsal
