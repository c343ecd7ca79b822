// fastsal._cuda: the operators of ops.h for Python. Imports without a driver; only calls need one.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;
using fastsal::Inputs;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastsal; arguments are Inputs and integers, described in csrc/cuda/ops.h";
  const auto release = py::call_guard<py::gil_scoped_release>();

  py::class_<Inputs>(m, "Inputs", py::module_local())  // tests load two builds of this module
      .def(py::init([](int norm, int dtype, uintptr_t jacobian, int64_t stride_b, int64_t stride_n, uintptr_t x,
                       int x_dtype, int64_t x_stride_b, int64_t B, int64_t n, int64_t D) {
        return Inputs{norm,
                      {reinterpret_cast<const void*>(jacobian), dtype},
                      stride_b,
                      stride_n,
                      {reinterpret_cast<const void*>(x), x_dtype},
                      x_stride_b,
                      B,
                      n,
                      D};
      }));
  m.def("why_not", &fastsal::why_not, "Why the current device cannot run these kernels; empty if it can.");
  m.def("runtime_version", &fastsal::runtime_version, "Of the CUDA runtime linked in: 13000 is 13.0.");
  m.def("sum_segments", &fastsal::sum_segments);
  m.def("row_sums", &fastsal::row_sums, release);
  m.def("margin_geometry", &fastsal::margin_geometry, release);
  m.def("pairwise_margins_scratch", &fastsal::pairwise_margins_scratch);
  m.def("pairwise_margins", &fastsal::pairwise_margins, release);
  m.def("pairwise_backward_scratch", &fastsal::pairwise_backward_scratch);
  m.def("pairwise_backward", &fastsal::pairwise_backward, release);
}
