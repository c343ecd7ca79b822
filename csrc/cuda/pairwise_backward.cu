// pairwise_backward: grad g_i = sum_j w_ij phi(g_i - g_j) + sum_j v_ij x, and grad x = sum_{i<j} v_ij (g_i - g_j), with
// phi as in fastsal/tensor/reference.py. The sums are in float64, for the range of the weights. The differences are
// formed again, entry by entry.
#include "launch.cuh"
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
  Inputs in;
  double* sums_ptr;         // [B, n], sum_j v_ij
  Top* tops_ptr;            // [B, n, n], for q = infinity
  const double* w_ptr;      // [B, n, n]
  const double* v_ptr;      // [B, n, n] or null
  void* grad_jacobian_ptr;  // [B, n, D], of the Jacobian's dtype
  void* grad_x_ptr;         // [B, D], of the dtype of x
};

// A warp for each i.
__global__ void __launch_bounds__(kThreads) pairwise_backward_sum_weights_kernel(const __grid_constant__ Problem p) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarpSize;
  if (row >= p.in.B * p.in.n) return;
  double sum = 0;
  for (int64_t j = lane_id(); j < p.in.n; j += kWarpSize) sum += p.v_ptr[row * p.in.n + j];
  sum = join_lanes<kL1>(sum);
  if (lane_id() == 0) p.sums_ptr[row] = sum;
}

// A warp for each pair i, j.
__global__ void __launch_bounds__(kThreads) pairwise_backward_tops_kernel(const __grid_constant__ Problem p) {
  const int64_t n = p.in.n, pair = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarpSize;
  const int64_t b = pair / (n * n), i = pair / n % n, j = pair % n;
  if (b >= p.in.B || i > j) return;
  const Entries row_i = p.in.row(b, i), row_j = p.in.row(b, j);
  const auto size = [=](int64_t k) { return fabs(row_i(k) - row_j(k)); };
  double top = 0, count = 0;
  for (int64_t k = lane_id(); k < p.in.D; k += kWarpSize) top = larger(top, size(k));
  top = join_lanes<kMax>(top);
  for (int64_t k = lane_id(); k < p.in.D; k += kWarpSize) count += size(k) == top;
  count = join_lanes<kL1>(count);
  if (lane_id() == 0) p.tops_ptr[(b * n + i) * n + j] = p.tops_ptr[(b * n + j) * n + i] = {top, count};
}

// A thread for entry k of kGroupRows rows.
template <int q>
__global__ void __launch_bounds__(kThreads) pairwise_backward_rows_kernel(const __grid_constant__ Problem p) {
  const int64_t n = p.in.n, D = p.in.D, groups = ceil_div(n, kGroupRows), tiles = ceil_div(D, kThreads);
  const int64_t b = blockIdx.x / (tiles * groups), first = blockIdx.x % groups * kGroupRows;
  const int64_t k = blockIdx.x / groups % tiles * kThreads + threadIdx.x;
  if (k >= D) return;
  double g[kGroupRows], sums[kGroupRows] = {};
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) g[r] = p.in.row(b, first + r < n ? first + r : first)(k);
  for (int64_t j = 0; j < n; ++j) {
    const double other = p.in.row(b, j)(k);
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      const int64_t at = (b * n + (first + r < n ? first + r : first)) * n + j;
      const double d = g[r] - other, sign = static_cast<double>((d > 0) - (d < 0));
      double phi = q == kL2 ? d : sign;
      if constexpr (q == kMax) phi = (fabs(d) == p.tops_ptr[at].value ? sign : 0) / p.tops_ptr[at].count;
      sums[r] = fma(p.w_ptr[at], phi, sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) {
    if (first + r >= n) break;
    const int64_t row = b * n + first + r;
    const double gradient = p.v_ptr ? fma(p.sums_ptr[row], p.in.x_of(b)(k), sums[r]) : sums[r];
    store(p.grad_jacobian_ptr, p.in.jacobian.dtype, row * D + k, gradient);
  }
}

// sum_{i<j} v_ij (g_i - g_j) = sum_i s_i (g_i - g_0) with s_i = sum_j v_ij, since v is antisymmetric and so the s_i add
// to 0.
__global__ void __launch_bounds__(kThreads) pairwise_backward_x_kernel(const __grid_constant__ Problem p) {
  const int64_t D = p.in.D, tiles = ceil_div(D, kThreads), b = blockIdx.x / tiles;
  const int64_t k = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (k >= D) return;
  const double g = p.in.row(b, 0)(k);
  double sum = 0;
  for (int64_t i = 1; i < p.in.n; ++i) sum = fma(p.sums_ptr[b * p.in.n + i], p.in.row(b, i)(k) - g, sum);
  store(p.grad_x_ptr, p.in.x.dtype, b * D + k, sum);
}

}  // namespace

int64_t pairwise_backward_scratch(const Inputs& in) {
  return in.B * in.n * (sizeof(double) + (in.norm == kMax ? in.n * sizeof(Top) : 0));
}

void pairwise_backward(const Inputs& in, uintptr_t scratch, uintptr_t w, uintptr_t v, uintptr_t grad_jacobian,
                       uintptr_t grad_x, uintptr_t stream) {
  double* sums = pointer<double>(scratch);
  const Problem p = {in,
                     sums,
                     reinterpret_cast<Top*>(sums + in.B * in.n),
                     pointer<const double>(w),
                     pointer<const double>(v),
                     pointer<void>(grad_jacobian),
                     pointer<void>(grad_x)};
  const int64_t tiles = ceil_div(in.D, kThreads);
  if (v) {
    launch(stream, "pairwise_backward_sum_weights_kernel", pairwise_backward_sum_weights_kernel,
           ceil_div(in.B * in.n * kWarpSize, kThreads), kThreads, p);
    launch(stream, "pairwise_backward_x_kernel", pairwise_backward_x_kernel, in.B * tiles, kThreads, p);
  }
  if (in.norm == kMax) {
    launch(stream, "pairwise_backward_tops_kernel", pairwise_backward_tops_kernel,
           ceil_div(in.B * in.n * in.n * kWarpSize, kThreads), kThreads, p);
  }
  with_norm(in.norm, [&](auto q) {
    launch(stream, "pairwise_backward_rows_kernel", pairwise_backward_rows_kernel<q.value>,
           in.B * ceil_div(in.n, kGroupRows) * tiles, kThreads, p);
  });
}

}  // namespace fastsal
