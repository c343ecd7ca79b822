// fastsal._cpu: tensors come in as pointers, sizes and strides (in elements). The Python side checks and owns them.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ops.h"
#include "simd/levels.h"

namespace {

using fastsal::Dtype;
using fastsal::Inputs;
using fastsal::Logits;
using fastsal::Output;
using fastsal::Rows;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("fastsal._cpu: ") + what);
}

Dtype dtype_of(int code) {
  require(code >= 0 && code < fastsal::kDtypes, "dtype code: want 0 float32, 1 float64, 2 float16 or 3 bfloat16");
  return static_cast<Dtype>(code);
}

int norm_of(int q) {
  require(q >= 0 && q <= 2, "norm code: want 2, 1 or 0 (infinity)");
  return q;
}

template <class T>
T* pointer(uintptr_t address, bool needed = true) {
  require(address != 0 || !needed, "null pointer");
  return reinterpret_cast<T*>(address);
}

Rows rows_of(uintptr_t data, int dtype, int64_t stride_b, int64_t stride_n, int64_t B, int64_t n, int64_t D) {
  require(B >= 0 && n >= 0 && D >= 1, "sizes: want B >= 0, n >= 0, D >= 1");
  return {pointer<const char>(data, B > 0 && n > 0), dtype_of(dtype), stride_b, stride_n, B, n, D};
}

Inputs inputs_of(uintptr_t data, int dtype, int64_t stride_b, const Rows& rows, bool needed) {
  require(data == 0 || dtype == rows.dtype || dtype == fastsal::kFloat32, "x: want the Jacobian's dtype or float32");
  return {pointer<const char>(data, needed && rows.B > 0), dtype_of(dtype), stride_b};
}

Logits logits_of(uintptr_t data, int dtype, const Rows& rows) {
  require(dtype == fastsal::kFloat32 || dtype == fastsal::kFloat64, "logits: want dtype code 0 or 1");
  return {pointer<const void>(data, rows.B > 0), dtype == fastsal::kFloat64};
}

Output output_of(uintptr_t data, const Rows& rows, bool needed = true) {
  return {pointer<void>(data, needed && rows.B > 0), rows.dtype == fastsal::kFloat64};
}

void row_distances(int q, int dtype, uintptr_t anchor_ptr, int64_t anchor_stride_b, uintptr_t rows_ptr,
                   int64_t rows_stride_b, int64_t rows_stride_n, int64_t B, int64_t c, int64_t D, uintptr_t out_ptr,
                   int threads) {
  const Rows anchor = rows_of(anchor_ptr, dtype, anchor_stride_b, 0, B, 1, D);
  const Rows rows = rows_of(rows_ptr, dtype, rows_stride_b, rows_stride_n, B, c, D);
  fastsal::row_distances(norm_of(q), anchor, rows, pointer<double>(out_ptr, B * c > 0), threads);
}

void margin_geometry(int q, int dtype, uintptr_t logits_ptr, int logits_dtype, uintptr_t jac_ptr, int64_t stride_b,
                     int64_t stride_n, uintptr_t x_ptr, int x_dtype, int64_t x_stride_b, int64_t B, int64_t n,
                     int64_t D, uintptr_t scalars_ptr, uintptr_t indices_ptr, uintptr_t distances_ptr, int threads) {
  require(n >= 2, "sizes: want n >= 2");
  const Rows jacobian = rows_of(jac_ptr, dtype, stride_b, stride_n, B, n, D);
  const Logits logits = logits_of(logits_ptr, logits_dtype, jacobian);
  const Inputs x = inputs_of(x_ptr, x_dtype, x_stride_b, jacobian, true);
  fastsal::margin_geometry(norm_of(q), logits, jacobian, x, output_of(scalars_ptr, jacobian),
                           pointer<int64_t>(indices_ptr, B > 0), output_of(distances_ptr, jacobian), threads);
}

// alignment_ptr receives the signed projection <x, g_i - g_j> / ||g_i - g_j||.
void pairwise_margins(int q, int dtype, uintptr_t logits_ptr, int logits_dtype, uintptr_t jac_ptr, int64_t stride_b,
                      int64_t stride_n, uintptr_t x_ptr, int x_dtype, int64_t x_stride_b, int64_t B, int64_t n,
                      int64_t D, uintptr_t distance_ptr, uintptr_t margin_ptr, uintptr_t nearest_margin_ptr,
                      uintptr_t nearest_ptr, uintptr_t alignment_ptr, int threads) {
  require(n >= 2, "sizes: want n >= 2");
  require((x_ptr == 0) == (alignment_ptr == 0) || B == 0, "x and alignment: want both or neither");
  const Rows jacobian = rows_of(jac_ptr, dtype, stride_b, stride_n, B, n, D);
  const Logits logits = logits_of(logits_ptr, logits_dtype, jacobian);
  const Inputs x = inputs_of(x_ptr, x_dtype, x_stride_b, jacobian, false);
  fastsal::pairwise_margins(norm_of(q), logits, jacobian, x, output_of(distance_ptr, jacobian),
                            output_of(margin_ptr, jacobian), output_of(nearest_margin_ptr, jacobian),
                            pointer<int64_t>(nearest_ptr, B > 0), output_of(alignment_ptr, jacobian, false), threads);
}

// w_ptr: double [B, n, n], symmetric. v_ptr: double [B, n, n], antisymmetric, or 0; with it x and grad_x_ptr.
// grad_jacobian_ptr: [B, n, D] contiguous in the Jacobian's dtype. grad_x_ptr: double [B, D] or 0.
void pairwise_backward(int q, int dtype, uintptr_t w_ptr, uintptr_t v_ptr, uintptr_t jac_ptr, int64_t stride_b,
                       int64_t stride_n, uintptr_t x_ptr, int x_dtype, int64_t x_stride_b, int64_t B, int64_t n,
                       int64_t D, uintptr_t grad_jacobian_ptr, uintptr_t grad_x_ptr, int threads) {
  const Rows jacobian = rows_of(jac_ptr, dtype, stride_b, stride_n, B, n, D);
  const Inputs x = inputs_of(x_ptr, x_dtype, x_stride_b, jacobian, v_ptr != 0);
  require(v_ptr != 0 || grad_x_ptr == 0, "grad_x: want v with it");
  fastsal::pairwise_backward(norm_of(q), pointer<const double>(w_ptr, B * n > 0), pointer<const double>(v_ptr, false),
                             jacobian, x, pointer<char>(grad_jacobian_ptr, B * n > 0),
                             pointer<double>(grad_x_ptr, false), threads);
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace

// Without the lock of CPython too: what is shared is atomic, and the kernels run outside of the lock as it is.
PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
  m.doc() = "CPU kernels of fastsal; see fastsal/tensor/backends/cpu.py.";
  const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("row_distances", &row_distances, release);
  m.def("margin_geometry", &margin_geometry, release);
  m.def("pairwise_margins", &pairwise_margins, release);
  m.def("pairwise_backward", &pairwise_backward, release);
  m.def("simd_level", [] { return fastsal::kernels().name; });
  m.def("set_simd_level", &fastsal::set_simd_level);
  m.def("reads_few_streams", &fastsal::reads_few_streams);
  m.def("set_reads_few_streams", &fastsal::set_reads_few_streams);
  m.def("openmp", &has_openmp);
}
