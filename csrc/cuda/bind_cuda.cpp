// fastsal._cuda: the operators of ops.h for Python. Imports without a driver; only calls need one.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastsal; every argument is an integer, described in csrc/cuda/ops.h";
  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def("why_not", &fastsal::why_not, "Why the current device cannot run these kernels; empty if it can.");
  m.def("runtime_version", &fastsal::runtime_version, "Of the CUDA runtime linked in: 13000 is 13.0.");
  m.def("row_distances_scratch", &fastsal::row_distances_scratch);
  m.def("row_distances", &fastsal::row_distances, release);
  m.def("margin_geometry_scratch", &fastsal::margin_geometry_scratch);
  m.def("margin_geometry", &fastsal::margin_geometry, release);
  m.def("pairwise_margins_blocks", &fastsal::pairwise_margins_blocks);
  m.def("pairwise_margins_scratch", &fastsal::pairwise_margins_scratch);
  m.def("pairwise_margins", &fastsal::pairwise_margins, release);
  m.def("pairwise_backward_scratch", &fastsal::pairwise_backward_scratch);
  m.def("pairwise_backward", &fastsal::pairwise_backward, release);
}
