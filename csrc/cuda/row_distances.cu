// row_distances: ‖anchor - row‖_q of a few rows per example, for the streaming path.
#include "dispatch.cuh"
#include "launch.cuh"
#include "ops.h"
#include "stage1.cuh"

namespace fastsal {
namespace {

constexpr int kThreads = 256;

template <int q, class T>
__global__ void __launch_bounds__(kThreads, 2)
    row_distances_fold_kernel(const T* anchor_ptr, int64_t anchor_stride_b, const T* rows_ptr, int64_t stride_b,
                              int64_t stride_n, Shape shape, Fold<T>* folds) {
  const int64_t tasks = distance_tasks(shape.n, segments<T>(shape.D));
  const int64_t task = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarpSize, b = task / tasks;
  if (b >= shape.B) return;
  fold_task<q, T>(task % tasks, anchor_ptr + b * anchor_stride_b, {rows_ptr + b * stride_b, stride_n, shape.n}, -1,
                  shape.D, folds + b * shape.n * segments<T>(shape.D));
}

template <int q, class T>
__global__ void __launch_bounds__(kThreads, 2)
    row_distances_join_kernel(const Fold<T>* folds, int64_t rows, int64_t segments, int lanes, double* out) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / lanes;
  const double distance = join_segments<q, T>(folds, row < rows ? row : -1, segments, lanes);
  if (row < rows && lane_id() % lanes == 0) out[row] = distance;
}

}  // namespace

int64_t row_distances_scratch(int dtype, Shape shape) {
  return with_type(dtype, [&](auto type) -> int64_t {
    using T = typename decltype(type)::type;
    return shape.B * shape.n * segments<T>(shape.D) * static_cast<int64_t>(sizeof(Fold<T>));
  });
}

void row_distances(int norm, int dtype, uintptr_t anchor, int64_t anchor_stride_b, RowsArgument rows, Shape shape,
                   uintptr_t out, uintptr_t scratch, uintptr_t stream) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_norm(norm, [&](auto q) {
      Fold<T>* folds = pointer<Fold<T>>(scratch);
      const int64_t count = segments<T>(shape.D), tasks = shape.B * distance_tasks(shape.n, count);
      const int64_t warps = warps_of_block(tasks, kThreads / kWarpSize);
      const Stream on(stream);
      on.launch("row_distances_fold_kernel", row_distances_fold_kernel<q.value, T>, ceil_div(tasks, warps),
                static_cast<int>(warps * kWarpSize), 0, pointer<const T>(anchor), anchor_stride_b,
                pointer<const T>(rows.data), rows.stride_b, rows.stride_n, shape, folds);
      const int lanes = joining_lanes(count);
      on.launch("row_distances_join_kernel", row_distances_join_kernel<q.value, T>,
                ceil_div(shape.B * shape.n * lanes, kThreads), kThreads, 0, static_cast<const Fold<T>*>(folds),
                shape.B * shape.n, count, lanes, pointer<double>(out));
    });
  });
}

}  // namespace fastsal
