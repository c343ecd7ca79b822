// margin_geometry, which reads the Jacobian once. It takes six small steps: predict, fold the rows, join their folds,
// sum over the two winning rows, fold the direction gap, finalize. Either one block takes all of them for an example,
// in its shared memory (the fused kernel), or six kernels spread one step each over the device. Both give the same
// bits.
#include "dispatch.cuh"
#include "fastsal/scalars.h"
#include "launch.cuh"
#include "ops.h"
#include "stage1.cuh"
#include "stage2.cuh"

namespace fastsal {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// The shared memory that an example may take in the fused kernel. It is less than the 48 KiB that every device grants,
// so that several blocks fit beside the first level cache.
constexpr int64_t kSharedBytes = 40 * 1024;
constexpr int64_t kGapBlocks = 64;  // an example has no more of them, since each first joins all its TwoRowFolds

template <class T>
struct Problem {
  using Out = Real<T>;
  const Out* logits_ptr;  // [B, n]
  const T* jacobian_ptr;
  int64_t stride_b, stride_n;
  const void* x_ptr;
  bool x_is_float;
  int64_t x_stride_b;
  Shape shape;
  Out* scalars_ptr;      // [kScalars, B]
  int64_t* indices_ptr;  // prediction and runner_up [2, B]
  Out* distances_ptr;    // [B, n]
  char* scratch_ptr;
};

// What the steps of an example hand on to each other.
template <class T>
struct Workspace {
  TwoRowSums* totals;
  TwoRowFolds* two_rows;  // [segments]
  Fold<T>* folds;         // [n, segments]
  double* ratios;         // [n]
  double* gaps;           // [segments]

  static __host__ __device__ int64_t bytes(int64_t n, int64_t segments) {
    const int64_t sizes[] = {static_cast<int64_t>(sizeof(TwoRowSums)),
                             static_cast<int64_t>(sizeof(TwoRowFolds)) * segments,
                             static_cast<int64_t>(sizeof(Fold<T>)) * n * segments, 8 * n, 8 * segments};
    return ceil_div(sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4], kPackBytes) * kPackBytes;
  }
  __device__ Workspace(char* at, int64_t n, int64_t segments)
      : totals(reinterpret_cast<TwoRowSums*>(at)),
        two_rows(reinterpret_cast<TwoRowFolds*>(totals + 1)),
        folds(reinterpret_cast<Fold<T>*>(two_rows + segments)),
        ratios(reinterpret_cast<double*>(folds + n * segments)),
        gaps(ratios + n) {}
};

// One example of a problem: its tensors, its workspace, and the steps.
template <int q, class T>
struct Example {
  using Out = Real<T>;
  const Problem<T>& p;
  int64_t b, segment_count;
  Workspace<T> w;

  __device__ Example(const Problem<T>& problem, int64_t index, char* workspace)
      : p(problem),
        b(index),
        segment_count(segments<T>(problem.shape.D)),
        w(workspace, problem.shape.n, segment_count) {}
  __device__ Example(const Problem<T>& problem, int64_t index)
      : Example(problem, index,
                problem.scratch_ptr + index * Workspace<T>::bytes(problem.shape.n, segments<T>(problem.shape.D))) {}

  __device__ double logit(int64_t j) const { return p.logits_ptr[b * p.shape.n + j]; }
  __device__ const T* row(int64_t j) const { return p.jacobian_ptr + b * p.stride_b + j * p.stride_n; }
  __device__ int64_t& prediction() const { return p.indices_ptr[b]; }
  __device__ int64_t& runner_up() const { return p.indices_ptr[p.shape.B + b]; }
  __device__ double margin(int64_t j) const { return logit(prediction()) - logit(j); }
  __device__ WinningRows<T> winners(int64_t other) const {
    const int64_t offset = b * p.x_stride_b * static_cast<int64_t>(p.x_is_float ? sizeof(float) : sizeof(T));
    return {row(prediction()), row(other), {static_cast<const char*>(p.x_ptr) + offset, p.x_is_float}};
  }

  // By a whole block. The argmax of the logits is the nearest of their negatives.
  __device__ void predict() const {
    const int64_t best = block_nearest(p.shape.n, [&](int64_t j) { return Candidate{-logit(j), 0, j}; }).index;
    if (threadIdx.x == 0) prediction() = best;
  }
  __device__ void fold_rows(int64_t task) const {
    const int64_t i = prediction();
    fold_task<q, T>(task, row(i), {row(0), p.stride_n, p.shape.n}, i, p.shape.D, w.folds);
  }
  // By `lanes` lanes, row j; j < 0 is no row, see join_segments.
  __device__ void join_row(int64_t j, int lanes) const {
    const double distance = join_segments<q, T>(w.folds, j, segment_count, lanes);
    if (j < 0 || lane_id() % lanes != 0) return;
    w.ratios[j] = j == prediction() ? INFINITY : ratio(margin(j), distance);
    store(&p.distances_ptr[b * p.shape.n + j], w.ratios[j]);
  }
  // By a whole block: the runner-up. Every thread has the result.
  __device__ int64_t select() const {
    const int64_t i = prediction();
    const auto candidate = [&](int64_t j) { return Candidate{w.ratios[j], margin(j), j == i ? -1 : j}; };
    return block_nearest(p.shape.n, candidate).index;
  }
  __device__ void finalize() const {  // by one warp
    const double gap = join_gaps<q>(w.gaps, segment_count);
    if (lane_id() != 0) return;
    double scalars[kScalars];
    const int64_t j = runner_up();
    two_row_scalars(logit(prediction()), margin(j), w.ratios[j], *w.totals, gap, scalars);
    for (int s = 0; s < kScalars; ++s) store(&p.scalars_ptr[s * p.shape.B + b], scalars[s]);
  }
};

template <int q, class T>
__global__ void __launch_bounds__(kThreads, 2) margin_geometry_fused_kernel(const __grid_constant__ Problem<T> p) {
  const int64_t warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (int64_t b = blockIdx.x; b < p.shape.B; b += gridDim.x) {
    const Example<q, T> example(p, b, dynamic_shared());
    example.predict();
    __syncthreads();
    const int64_t tasks = distance_tasks(p.shape.n, example.segment_count);
    for (int64_t task = warp; task < tasks; task += warps) example.fold_rows(task);
    __syncthreads();
    const int lanes = joining_lanes(example.segment_count);
    for (int64_t first = 0; first < p.shape.n; first += blockDim.x / lanes) {
      const int64_t j = first + threadIdx.x / lanes;
      example.join_row(j < p.shape.n ? j : -1, lanes);
    }
    __syncthreads();
    const int64_t runner_up = example.select();
    if (threadIdx.x == 0) example.runner_up() = runner_up;
    const WinningRows<T> winners = example.winners(runner_up);
    for (int64_t c = warp; c < example.segment_count; c += warps) {
      two_rows_task<q, T>(c, winners, p.shape.D, example.w.two_rows);
    }
    __syncthreads();
    if (warp == 0) {
      const TwoRowSums totals = join_two_rows<q>(example.w.two_rows, example.segment_count);
      if (lane_id() == 0) *example.w.totals = totals;
    }
    __syncthreads();
    for (int64_t c = warp; c < example.segment_count; c += warps) {
      gap_task<q, T>(c, winners, *example.w.totals, p.shape.D, example.w.gaps);
    }
    __syncthreads();
    if (warp == 0) example.finalize();
    __syncthreads();  // the workspace is the next example's
  }
}

template <int q, class T>
__global__ void __launch_bounds__(kThreads) margin_geometry_predict_kernel(const __grid_constant__ Problem<T> p) {
  Example<q, T>(p, blockIdx.x).predict();
}

template <int q, class T>
__global__ void __launch_bounds__(kThreads, 2) margin_geometry_fold_kernel(const __grid_constant__ Problem<T> p) {
  const int64_t tasks = distance_tasks(p.shape.n, segments<T>(p.shape.D));
  const int64_t task = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarpSize, b = task / tasks;
  if (b < p.shape.B) Example<q, T>(p, b).fold_rows(task % tasks);
}

template <int q, class T>
__global__ void __launch_bounds__(kThreads)
    margin_geometry_join_kernel(const __grid_constant__ Problem<T> p, int lanes) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / lanes, b = row / p.shape.n;
  const bool real_row = b < p.shape.B;
  Example<q, T>(p, real_row ? b : 0).join_row(real_row ? row % p.shape.n : -1, lanes);
}

// The blocks of one example all select the same runner-up; the first of them writes it down.
template <int q, class T>
__global__ void __launch_bounds__(kThreads, 1)
    margin_geometry_two_rows_kernel(const __grid_constant__ Problem<T> p, int64_t blocks) {
  const Example<q, T> example(p, blockIdx.x / blocks);
  const int64_t runner_up = example.select(), segment = blockIdx.x % blocks * kWarps + threadIdx.x / kWarpSize;
  if (threadIdx.x == 0 && segment == 0) example.runner_up() = runner_up;
  if (segment < example.segment_count) {
    two_rows_task<q, T>(segment, example.winners(runner_up), p.shape.D, example.w.two_rows);
  }
}

// The blocks of one example all join the same totals; the first of them writes them down.
template <int q, class T>
__global__ void __launch_bounds__(kThreads)
    margin_geometry_gap_kernel(const __grid_constant__ Problem<T> p, int64_t blocks) {
  __shared__ TwoRowSums totals;
  const Example<q, T> example(p, blockIdx.x / blocks);
  const int64_t first = blockIdx.x % blocks * kWarps;
  if (threadIdx.x < kWarpSize) {
    const TwoRowSums joined = join_two_rows<q>(example.w.two_rows, example.segment_count);
    if (lane_id() == 0) totals = joined;
    if (lane_id() == 0 && first == 0) *example.w.totals = joined;
  }
  __syncthreads();
  const WinningRows<T> winners = example.winners(example.runner_up());
  for (int64_t c = first + threadIdx.x / kWarpSize; c < example.segment_count; c += blocks * kWarps) {
    gap_task<q, T>(c, winners, totals, p.shape.D, example.w.gaps);
  }
}

template <int q, class T>
__global__ void __launch_bounds__(kWarpSize) margin_geometry_finalize_kernel(const __grid_constant__ Problem<T> p) {
  Example<q, T>(p, blockIdx.x).finalize();
}

template <int q, class T>
void launch_steps(const Problem<T>& p, bool fused, uintptr_t stream) {
  const int64_t B = p.shape.B, n = p.shape.n, count = segments<T>(p.shape.D), tasks = distance_tasks(n, count);
  if (fused) {
    const int64_t warps = tasks < 2 ? 2 : tasks > kWarps ? kWarps : tasks, blocks = B < INT32_MAX ? B : INT32_MAX;
    launch("margin_geometry_fused_kernel", margin_geometry_fused_kernel<q, T>, blocks,
           static_cast<int>(warps * kWarpSize), Workspace<T>::bytes(n, count), stream, p);
    return;
  }
  const int lanes = joining_lanes(count);
  const int64_t blocks = ceil_div(count, kWarps), gap_blocks = blocks < kGapBlocks ? blocks : kGapBlocks;
  launch("margin_geometry_predict_kernel", margin_geometry_predict_kernel<q, T>, B, kThreads, 0, stream, p);
  launch("margin_geometry_fold_kernel", margin_geometry_fold_kernel<q, T>, ceil_div(B * tasks, kWarps), kThreads, 0,
         stream, p);
  launch("margin_geometry_join_kernel", margin_geometry_join_kernel<q, T>, ceil_div(B * n * lanes, kThreads), kThreads,
         0, stream, p, lanes);
  launch("margin_geometry_two_rows_kernel", margin_geometry_two_rows_kernel<q, T>, B * blocks, kThreads, 0, stream, p,
         blocks);
  launch("margin_geometry_gap_kernel", margin_geometry_gap_kernel<q, T>, B * gap_blocks, kThreads, 0, stream, p,
         gap_blocks);
  launch("margin_geometry_finalize_kernel", margin_geometry_finalize_kernel<q, T>, B, kWarpSize, 0, stream, p);
}

template <class F>
int64_t of_type(int dtype, F f) {
  return with_type(dtype, [&](auto type) -> int64_t { return f(type); });
}

}  // namespace

int64_t margin_geometry_tasks(int dtype, Shape shape) {
  return of_type(dtype,
                 [&](auto type) { return distance_tasks(shape.n, segments<typename decltype(type)::type>(shape.D)); });
}

int64_t margin_geometry_bytes(int dtype, Shape shape) {
  return of_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return Workspace<T>::bytes(shape.n, segments<T>(shape.D));
  });
}

bool margin_geometry_fits(int dtype, Shape shape) { return margin_geometry_bytes(dtype, shape) <= kSharedBytes; }

int64_t margin_geometry_scratch(int dtype, Shape shape, bool fused) {
  return fused ? 0 : shape.B * margin_geometry_bytes(dtype, shape);
}

void margin_geometry(int norm, int dtype, uintptr_t logits, RowsArgument jacobian, InputArgument x, Shape shape,
                     uintptr_t scalars, uintptr_t indices, uintptr_t distances, bool fused, uintptr_t scratch,
                     uintptr_t stream) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_norm(norm, [&](auto q) {
      const Problem<T> p = {pointer<const Real<T>>(logits),
                            pointer<const T>(jacobian.data),
                            jacobian.stride_b,
                            jacobian.stride_n,
                            pointer<const void>(x.data),
                            x.dtype == kFloat32,
                            x.stride_b,
                            shape,
                            pointer<Real<T>>(scalars),
                            pointer<int64_t>(indices),
                            pointer<Real<T>>(distances),
                            pointer<char>(scratch)};
      launch_steps<q.value, T>(p, fused, stream);
    });
  });
}

}  // namespace fastsal
