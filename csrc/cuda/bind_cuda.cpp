// fastsal._cuda: the operators of ops.h for Python. Imports without a driver; only calls need one.
#include <pybind11/pybind11.h>

#include <string>

#include "ops.h"

namespace py = pybind11;
using fastsal::InputArgument;
using fastsal::RowsArgument;
using fastsal::Shape;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastsal; every argument is an integer, described in csrc/cuda/ops.h";
  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def("why_not", &fastsal::why_not, "Why the current device cannot run these kernels; empty if it can.");
  m.def("runtime_version", &fastsal::runtime_version, "Of the CUDA runtime linked in: 13000 is 13.0.");

  m.def("row_distances_scratch", [](int dtype, int64_t B, int64_t n, int64_t D) {
    return fastsal::row_distances_scratch(dtype, Shape{B, n, D});
  });
  m.def(
      "row_distances",
      [](int norm, int dtype, uintptr_t anchor, int64_t anchor_stride_b, uintptr_t rows, int64_t stride_b,
         int64_t stride_n, int64_t B, int64_t n, int64_t D, uintptr_t out, uintptr_t scratch, uintptr_t stream) {
        fastsal::row_distances(norm, dtype, anchor, anchor_stride_b, RowsArgument{rows, stride_b, stride_n},
                               Shape{B, n, D}, out, scratch, stream);
      },
      release);

  m.def("margin_geometry_scratch", [](int dtype, int64_t B, int64_t n, int64_t D) {
    return fastsal::margin_geometry_scratch(dtype, Shape{B, n, D});
  });
  m.def(
      "margin_geometry",
      [](int norm, int dtype, uintptr_t logits, uintptr_t jacobian, int64_t stride_b, int64_t stride_n, uintptr_t x,
         int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n, int64_t D, uintptr_t scalars, uintptr_t indices,
         uintptr_t distances, bool is_short, uintptr_t scratch, uintptr_t stream) {
        fastsal::margin_geometry(norm, dtype, logits, RowsArgument{jacobian, stride_b, stride_n},
                                 InputArgument{x, x_dtype, x_stride_b}, Shape{B, n, D}, scalars, indices, distances,
                                 is_short, scratch, stream);
      },
      release);

  m.def("pairwise_margins_blocks", [](int dtype, int64_t B, int64_t n, int64_t D, bool by_segment) {
    return fastsal::pairwise_margins_blocks(dtype, Shape{B, n, D}, by_segment);
  });
  m.def("pairwise_margins_scratch", [](int64_t B, int64_t n, int64_t D, bool by_segment) {
    return fastsal::pairwise_margins_scratch(Shape{B, n, D}, by_segment);
  });
  m.def(
      "pairwise_margins",
      [](int norm, int dtype, uintptr_t logits, uintptr_t jacobian, int64_t stride_b, int64_t stride_n, uintptr_t x,
         int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n, int64_t D, uintptr_t distance, uintptr_t margin,
         uintptr_t nearest_margin, uintptr_t nearest, uintptr_t projection, bool by_segment, uintptr_t scratch,
         uintptr_t stream) {
        fastsal::pairwise_margins(norm, dtype, logits, RowsArgument{jacobian, stride_b, stride_n},
                                  InputArgument{x, x_dtype, x_stride_b}, Shape{B, n, D}, distance, margin,
                                  nearest_margin, nearest, projection, by_segment, scratch, stream);
      },
      release);

  m.def("pairwise_backward_scratch", [](int norm, int64_t B, int64_t n, int64_t D) {
    return fastsal::pairwise_backward_scratch(norm, Shape{B, n, D});
  });
  m.def(
      "pairwise_backward",
      [](int norm, int dtype, uintptr_t w, uintptr_t v, uintptr_t jacobian, int64_t stride_b, int64_t stride_n,
         uintptr_t x, int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n, int64_t D, uintptr_t grad_jacobian,
         uintptr_t grad_x, uintptr_t scratch, uintptr_t stream) {
        fastsal::pairwise_backward(norm, dtype, w, v, RowsArgument{jacobian, stride_b, stride_n},
                                   InputArgument{x, x_dtype, x_stride_b}, Shape{B, n, D}, grad_jacobian, grad_x,
                                   scratch, stream);
      },
      release);
}
