// The operators behind fastsal._cuda. Device pointers, strides in elements and the stream come as integers.
//
// `norm` and `dtype` are codes of fastsal/types.h. The Jacobian, or rows, [B, n, D] have unit stride along D, and so
// has x [B, D], of the Jacobian's type or float32; x 0 is no x. Logits and results are float64 where the Jacobian is,
// else float32. Everything runs on the current device. Scratch memory is 16-byte aligned and has the bytes that
// <operator>_scratch says.
#pragma once

#include <cstdint>
#include <string>

namespace fastsal {

std::string why_not();  // why the current device cannot run the kernels; empty if it can
int runtime_version();  // of the CUDA runtime linked in: 13000 is 13.0

int64_t row_distances_scratch(int dtype, int64_t B, int64_t n, int64_t D);
void row_distances(int norm, int dtype, uintptr_t anchor, int64_t anchor_stride_b, uintptr_t rows, int64_t stride_b,
                   int64_t stride_n, int64_t B, int64_t n, int64_t D, uintptr_t out, uintptr_t scratch,
                   uintptr_t stream);

// `indices` [2, B] holds the predictions already. `is_short`: a thread finishes an example, not a block; for short
// rows.
int64_t margin_geometry_scratch(int dtype, int64_t B, int64_t n, int64_t D);
void margin_geometry(int norm, int dtype, uintptr_t logits, uintptr_t jacobian, int64_t stride_b, int64_t stride_n,
                     uintptr_t x, int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n, int64_t D,
                     uintptr_t scalars, uintptr_t indices, uintptr_t distances, bool is_short, uintptr_t scratch,
                     uintptr_t stream);

// `by_segment`: a block takes one segment of D and not 16 of them, for problems that would not fill the device else.
int64_t pairwise_margins_blocks(int dtype, int64_t B, int64_t n, int64_t D, bool by_segment);
int64_t pairwise_margins_scratch(int64_t B, int64_t n, int64_t D, bool by_segment);
void pairwise_margins(int norm, int dtype, uintptr_t logits, uintptr_t jacobian, int64_t stride_b, int64_t stride_n,
                      uintptr_t x, int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n, int64_t D,
                      uintptr_t distance, uintptr_t margin, uintptr_t nearest_margin, uintptr_t nearest,
                      uintptr_t projection, bool by_segment, uintptr_t scratch, uintptr_t stream);

// From w, v (float64 [B, n, n]; v 0 is none), as fastsal.tensor.reference.pairwise_backward defines it. The gradients
// have the types of the Jacobian and of x and are contiguous.
int64_t pairwise_backward_scratch(int norm, int64_t B, int64_t n, int64_t D);
void pairwise_backward(int norm, int dtype, uintptr_t w, uintptr_t v, uintptr_t jacobian, int64_t stride_b,
                       int64_t stride_n, uintptr_t x, int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n,
                       int64_t D, uintptr_t grad_jacobian, uintptr_t grad_x, uintptr_t scratch, uintptr_t stream);

}  // namespace fastsal
