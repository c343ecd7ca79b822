// The operators behind fastsal._cuda. Device pointers, strides in elements and the stream come as integers.
//
// `norm` and `dtype` are codes of fastsal/types.h. Logits and results are float64 where the Jacobian is, else float32;
// x has the Jacobian's type or float32. Everything runs on the current device.
#pragma once

#include <cstdint>
#include <string>

namespace fastsal {

// An operand of the Jacobian's kind: [B, n, D] with unit stride along D.
struct RowsArgument {
  uintptr_t data;
  int64_t stride_b, stride_n;
};
struct InputArgument {  // x [B, D]; data 0 is no x
  uintptr_t data;
  int64_t dtype, stride_b;
};
struct Shape {
  int64_t B, n, D;
};

std::string why_not();  // why the current device cannot run the kernels; empty if it can
int runtime_version();

// The bytes of scratch memory (16-byte aligned) that the launch with the same arguments wants.
int64_t row_distances_scratch(int dtype, Shape shape);
void row_distances(int norm, int dtype, uintptr_t anchor, int64_t anchor_stride_b, RowsArgument rows, Shape shape,
                   uintptr_t out, uintptr_t scratch, uintptr_t stream);

// `indices` [2, B] holds the predictions already. `is_short`: one thread finishes an example of short rows, not a
// block.
int64_t margin_geometry_scratch(int dtype, Shape shape);
void margin_geometry(int norm, int dtype, uintptr_t logits, RowsArgument jacobian, InputArgument x, Shape shape,
                     uintptr_t scalars, uintptr_t indices, uintptr_t distances, bool is_short, uintptr_t scratch,
                     uintptr_t stream);

// `by_segment`: a block takes one segment of D and not 16 of them, for problems that would not fill the device
// otherwise.
int64_t pairwise_margins_blocks(int dtype, Shape shape, bool by_segment);
int64_t pairwise_margins_scratch(Shape shape, bool by_segment);
void pairwise_margins(int norm, int dtype, uintptr_t logits, RowsArgument jacobian, InputArgument x, Shape shape,
                      uintptr_t distance, uintptr_t margin, uintptr_t nearest_margin, uintptr_t nearest,
                      uintptr_t projection, bool by_segment, uintptr_t scratch, uintptr_t stream);

// From w, v (float64 [B, n, n]; v 0 is none), as fastsal.tensor.reference.pairwise_backward defines it. The gradients
// have the types of the Jacobian and of x and are contiguous.
int64_t pairwise_backward_scratch(int norm, Shape shape);
void pairwise_backward(int norm, int dtype, uintptr_t w, uintptr_t v, RowsArgument jacobian, InputArgument x,
                       Shape shape, uintptr_t grad_jacobian, uintptr_t grad_x, uintptr_t scratch, uintptr_t stream);

}  // namespace fastsal
