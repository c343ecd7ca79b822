// pairwise_backward: grad g_i = sum_j w_ij phi(g_i - g_j) + sum_j v_ij x, and grad x = sum_{i<j} v_ij (g_i - g_j), with
// phi as in fastsal/tensor/reference.py. The sums are in float64, for the range of the weights. The differences are
// formed again, entry by entry.
#include "dispatch.cuh"
#include "launch.cuh"
#include "loads.cuh"
#include "ops.h"
#include "warp.cuh"

namespace fastsal {
namespace {

constexpr int kThreads = 128;
constexpr int kGroupRows = 8;  // rows of a group, which share the loads of all the others

// The largest magnitude of g_i - g_j, and how many entries reach it.
struct Top {
  double value, count;
};

struct Problem {
  const double* w_ptr;  // [B, n, n]
  const double* v_ptr;  // [B, n, n] or null
  Rows rows;
  Vectors x;
  Shape shape;
  void* grad_jacobian_ptr;  // [B, n, D], of the Jacobian's dtype
  void* grad_x_ptr;         // [B, D], of the dtype of x
  double* sums_ptr;         // [B, n], sum_j v_ij
  Top* tops_ptr;            // [B, n, n], for q = infinity
};

// A warp for each i.
__global__ void __launch_bounds__(kThreads) pairwise_backward_sum_weights_kernel(const __grid_constant__ Problem p) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarpSize;
  if (row >= p.shape.B * p.shape.n) return;
  double sum = 0;
  for (int64_t j = lane_id(); j < p.shape.n; j += kWarpSize) sum += p.v_ptr[row * p.shape.n + j];
  sum = join_lanes<kL1>(sum);
  if (lane_id() == 0) p.sums_ptr[row] = sum;
}

// A warp for each pair i, j.
__global__ void __launch_bounds__(kThreads) pairwise_backward_tops_kernel(const __grid_constant__ Problem p) {
  const int64_t n = p.shape.n, pair = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarpSize;
  const int64_t b = pair / (n * n), i = pair / n % n, j = pair % n;
  if (b >= p.shape.B || i > j) return;
  const Entries row_i = p.rows(b, i), row_j = p.rows(b, j);
  const auto size = [=](int64_t k) { return magnitude(row_i(k) - row_j(k)); };
  double top = 0, count = 0;
  for (int64_t k = lane_id(); k < p.shape.D; k += kWarpSize) top = larger(top, size(k));
  top = join_lanes<kMax>(top);
  for (int64_t k = lane_id(); k < p.shape.D; k += kWarpSize) count += size(k) == top;
  count = join_lanes<kL1>(count);
  if (lane_id() == 0) p.tops_ptr[(b * n + i) * n + j] = p.tops_ptr[(b * n + j) * n + i] = {top, count};
}

// A thread for entry k of kGroupRows rows.
template <int q>
__global__ void __launch_bounds__(kThreads) pairwise_backward_rows_kernel(const __grid_constant__ Problem p) {
  const int64_t n = p.shape.n, D = p.shape.D, groups = ceil_div(n, kGroupRows), tiles = ceil_div(D, kThreads);
  const int64_t b = blockIdx.x / (tiles * groups), first = blockIdx.x % groups * kGroupRows;
  const int64_t k = blockIdx.x / groups % tiles * kThreads + threadIdx.x;
  if (k >= D) return;
  double g[kGroupRows], sums[kGroupRows] = {};
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) g[r] = p.rows(b, first + r < n ? first + r : first)(k);
  for (int64_t j = 0; j < n; ++j) {
    const double other = p.rows(b, j)(k);
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      const int64_t at = (b * n + (first + r < n ? first + r : first)) * n + j;
      const double d = g[r] - other, sign = static_cast<double>((d > 0) - (d < 0));
      double phi = q == kL2 ? d : sign;
      if constexpr (q == kMax) phi = (magnitude(d) == p.tops_ptr[at].value ? sign : 0) / p.tops_ptr[at].count;
      sums[r] = fma(p.w_ptr[at], phi, sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) {
    if (first + r >= n) break;
    const int64_t row = b * n + first + r;
    const double gradient = p.v_ptr ? fma(p.sums_ptr[row], p.x(b)(k), sums[r]) : sums[r];
    store(p.grad_jacobian_ptr, p.rows.entries.dtype, row * D + k, gradient);
  }
}

// sum_{i<j} v_ij (g_i - g_j) = sum_i s_i (g_i - g_0) with s_i = sum_j v_ij, since v is antisymmetric and so the s_i add
// to 0.
__global__ void __launch_bounds__(kThreads) pairwise_backward_x_kernel(const __grid_constant__ Problem p) {
  const int64_t D = p.shape.D, tiles = ceil_div(D, kThreads), b = blockIdx.x / tiles;
  const int64_t k = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (k >= D) return;
  const double g = p.rows(b, 0)(k);
  double sum = 0;
  for (int64_t i = 1; i < p.shape.n; ++i) sum = fma(p.sums_ptr[b * p.shape.n + i], p.rows(b, i)(k) - g, sum);
  store(p.grad_x_ptr, p.x.entries.dtype, b * D + k, sum);
}

}  // namespace

int64_t pairwise_backward_scratch(int norm, int64_t B, int64_t n, int64_t) {
  return B * n * (norm == kMax ? n * sizeof(Top) : 0) + B * n * sizeof(double);
}

void pairwise_backward(int norm, int dtype, uintptr_t w, uintptr_t v, uintptr_t jacobian, int64_t stride_b,
                       int64_t stride_n, uintptr_t x, int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n,
                       int64_t D, uintptr_t grad_jacobian, uintptr_t grad_x, uintptr_t scratch, uintptr_t stream) {
  const int64_t pairs = B * n * n, tiles = ceil_div(D, kThreads);
  Top* tops = pointer<Top>(scratch);
  const Problem p = {pointer<const double>(w),
                     pointer<const double>(v),
                     {{pointer<const void>(jacobian), dtype}, stride_b, stride_n},
                     {{pointer<const void>(x), x_dtype}, x_stride_b},
                     {B, n, D},
                     pointer<void>(grad_jacobian),
                     pointer<void>(grad_x),
                     reinterpret_cast<double*>(tops + (norm == kMax ? pairs : 0)),
                     tops};
  const Stream on(stream);
  if (v) {
    on.launch("pairwise_backward_sum_weights_kernel", pairwise_backward_sum_weights_kernel,
              ceil_div(B * n * kWarpSize, kThreads), kThreads, p);
    on.launch("pairwise_backward_x_kernel", pairwise_backward_x_kernel, B * tiles, kThreads, p);
  }
  if (norm == kMax) {
    on.launch("pairwise_backward_tops_kernel", pairwise_backward_tops_kernel, ceil_div(pairs * kWarpSize, kThreads),
              kThreads, p);
  }
  with_norm(norm, [&](auto q) {
    on.launch("pairwise_backward_rows_kernel", pairwise_backward_rows_kernel<q.value>,
              B * ceil_div(n, kGroupRows) * tiles, kThreads, p);
  });
}

}  // namespace fastsal
