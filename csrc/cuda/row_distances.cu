// row_distances: ‖anchor - row‖_q of a few rows per example, for the streaming path.
#include "dispatch.cuh"
#include "ops.h"
#include "row_sums.cuh"

namespace fastsal {
namespace {

constexpr int kThreads = 256;

// The norms of rows from the sums of their segments, `lanes` threads for each.
template <int q>
__global__ void __launch_bounds__(kThreads)
    row_distances_join_kernel(const RowSums* sums_ptr, int64_t rows, int segments, int lanes, double* out_ptr) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / lanes;
  const RowSums all = join_segments<q>(row < rows ? sums_ptr + row * segments : nullptr, segments, lanes);
  if (row < rows && (lane_id() & (lanes - 1)) == 0) out_ptr[row] = root<q>(all.norm);
}

}  // namespace

int64_t row_distances_scratch(int dtype, int64_t B, int64_t n, int64_t D) {
  if (dtype == kFloat64) return 0;
  return B * n * segments(D, entry_bytes(dtype)) * static_cast<int64_t>(sizeof(RowSums));
}

void row_distances(int norm, int dtype, uintptr_t anchor, int64_t anchor_stride_b, uintptr_t rows, int64_t stride_b,
                   int64_t stride_n, int64_t B, int64_t n, int64_t D, uintptr_t out, uintptr_t scratch,
                   uintptr_t stream) {
  const Stream on(stream);
  const Shape shape = {B, n, D};
  const Vectors anchors = {{pointer<const void>(anchor), dtype}, anchor_stride_b};
  // The anchor stands in for an x: two products beside the norm, which are not read.
  const RowSumsProblem p = {anchors, nullptr, {{pointer<const void>(rows), dtype}, stride_b, stride_n},
                            anchors, shape,   pointer<RowSums>(scratch),
                            nullptr};
  if (dtype == kFloat64) return launch_row_norms_double(on, norm, p, pointer<double>(out));
  launch_row_sums(on, norm, dtype, p);
  const int count = segments(D, entry_bytes(dtype));
  const int lanes = joining_lanes(count);
  with_norm(norm, [&](auto q) {
    on.launch("row_distances_join_kernel", row_distances_join_kernel<q.value>, ceil_div(B * n * lanes, kThreads),
              kThreads, static_cast<const RowSums*>(p.sums_ptr), B * n, count, lanes, pointer<double>(out));
  });
}

}  // namespace fastsal
