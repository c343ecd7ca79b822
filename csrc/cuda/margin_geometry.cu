// margin_geometry, which reads the Jacobian once. It takes six small steps: predict, fold the rows, join their folds,
// sum over the two winning rows, fold the direction gap, finalize. Either one block takes all of them for an example,
// in its shared memory (the fused kernel), or four kernels spread them over the device. Both give the same bits.
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
constexpr int kCopyWarps = 4;  // the most of a block that copies its example
// The shared memory that an example may take in the fused kernel. It is less than the 48 KiB that every device grants,
// so that several blocks fit beside the first level cache.
constexpr int64_t kSharedBytes = 40 * 1024;
// The most that its workspace and a copy of its rows and x may take. Beside what the kernel has of its own, 48 KiB.
constexpr int64_t kCopyBytes = 46 * 1024;
constexpr int64_t kGapBlocks = 64;  // an example has no more of them, since each first joins all its TwoRowFolds
// A block of the fold kernel predicts before it folds, so its warps take some tasks each where enough blocks are left.
constexpr int64_t kMostRounds = 4, kManyBlocks = 8 * kFewBlocks;
constexpr int64_t kManyClasses = 4096;  // from which on a kernel of its own predicts: every block would for too long
// What is on the way at once where few warps read: all steps of a slice, and the sums of the slices that a lane joins.
template <class T>
constexpr int kSliceSteps = kSliceBytes<T> / (kPackBytes * kWarpSize);
constexpr int kSliceSums = 5;  // of each lane, so 160 slices at once: an image of 3 x 224 x 224 has at most 147

template <class T>
struct Problem {
  using Out = Real<T>;
  const Out* logits_ptr;  // [B, n]
  const T* jacobian_ptr;
  int64_t stride_b, stride_n;
  Input<T> x;
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
  int64_t* arrived;       // the blocks that have folded their part of the gap
  double* top_logit;      // of the prediction, which would first have to be waited for
  TwoRowFolds* two_rows;  // [slices]
  Fold<T>* folds;         // [n, segments]
  double* ratios;         // [n]
  double* gaps;           // [slices]

  static __host__ __device__ int64_t bytes(int64_t n, int64_t D) {
    const int64_t all = sizeof(TwoRowSums) + sizeof(int64_t) + sizeof(double) +
                        (sizeof(TwoRowFolds) + sizeof(double)) * slices<T>(D) +
                        (sizeof(Fold<T>) * segments<T>(D) + sizeof(double)) * n;
    return ceil_div(all, kPackBytes) * kPackBytes;
  }
  __device__ Workspace(char* at, int64_t n, int64_t D)
      : totals(reinterpret_cast<TwoRowSums*>(at)),
        arrived(reinterpret_cast<int64_t*>(totals + 1)),
        top_logit(reinterpret_cast<double*>(arrived + 1)),
        two_rows(reinterpret_cast<TwoRowFolds*>(top_logit + 1)),
        folds(reinterpret_cast<Fold<T>*>(two_rows + slices<T>(D))),
        ratios(reinterpret_cast<double*>(folds + n * segments<T>(D))),
        gaps(ratios + n) {}
};

// Whether a block copies a whole example to its shared memory first: all of it is then on its way at once.
template <class T>
bool copies_examples(const Problem<T>& p) {
  const int64_t n = p.shape.n, D = p.shape.D, row_bytes = D * static_cast<int64_t>(sizeof(T));
  const int64_t x_bytes = D * (p.x.is_float ? sizeof(float) : sizeof(T));
  return D % Layout<T>::kPack == 0 && Workspace<T>::bytes(n, D) + n * row_bytes + x_bytes <= kCopyBytes &&
         is_aligned(reinterpret_cast<uintptr_t>(p.jacobian_ptr) | p.stride_b * sizeof(T) | p.stride_n * sizeof(T));
}

// One example of a problem: its tensors, its workspace, and the steps.
template <int q, class T>
struct Example {
  using Out = Real<T>;
  const Problem<T>& p;
  const int64_t b, segment_count, slice_count;
  const Workspace<T> w;
  const T* rows;
  int64_t stride_n;
  Input<T> x;

  __device__ Example(const Problem<T>& problem, int64_t index, char* workspace)
      : p(problem),
        b(index),
        segment_count(segments<T>(problem.shape.D)),
        slice_count(slices<T>(problem.shape.D)),
        w(workspace, problem.shape.n, problem.shape.D),
        rows(problem.jacobian_ptr + index * problem.stride_b),
        stride_n(problem.stride_n),
        x(problem.x.from(index * problem.x_stride_b)) {}
  __device__ Example(const Problem<T>& problem, int64_t index)
      : Example(problem, index, problem.scratch_ptr + index * Workspace<T>::bytes(problem.shape.n, problem.shape.D)) {}

  __device__ double logit(int64_t j) const { return p.logits_ptr[b * p.shape.n + j]; }
  __device__ const T* row(int64_t j) const { return rows + j * stride_n; }
  __device__ int64_t& prediction() const { return p.indices_ptr[b]; }
  __device__ int64_t& runner_up() const { return p.indices_ptr[p.shape.B + b]; }
  __device__ double margin(int64_t j) const { return *w.top_logit - logit(j); }
  __device__ WinningRows<T> winners(int64_t i, int64_t j) const { return {row(i), row(j), x, p.shape.D}; }

  // By a whole block: begins to copy the rows, and x where it is aligned, behind the workspace.
  __device__ void copy() {
    const int64_t n = p.shape.n, D = p.shape.D, row_bytes = D * static_cast<int64_t>(sizeof(T));
    char* to = dynamic_shared() + Workspace<T>::bytes(n, D);
    const char* from = reinterpret_cast<const char*>(rows);
    if (stride_n == D) {
      begin_copy(to, from, n * row_bytes);
    } else {
      for (int64_t j = 0; j < n; ++j) begin_copy(to + j * row_bytes, from + j * stride_n * sizeof(T), row_bytes);
    }
    rows = reinterpret_cast<const T*>(to);
    stride_n = D;
    if (!is_aligned(reinterpret_cast<uintptr_t>(x.first))) return;
    begin_copy(to + n * row_bytes, x.first, D * x.entry_bytes());
    x.first = to + n * row_bytes;
  }
  // By a whole block. The argmax of the logits is the nearest of their negatives. Every thread has the result.
  __device__ int64_t predict() const {
    return block_nearest(p.shape.n, [&](int64_t j) { return Candidate{-logit(j), 0, j}; }).index;
  }
  template <bool copied>
  __device__ __forceinline__ void fold_rows(int64_t task, int64_t i) const {
    fold_task<q, T, copied>(task, row(i), {rows, stride_n, p.shape.n}, i, p.shape.D, w.folds);
  }
  __device__ void hand_on(int64_t i) const { prediction() = i, *w.top_logit = logit(i); }
  // By `lanes` lanes, row j; j < 0 is no row, see join_segments.
  __device__ void join_row(int64_t i, int64_t j, int lanes) const {
    // On their way with the folds, so nothing is computed from them before.
    const Out other = p.logits_ptr[b * p.shape.n + (j < 0 ? 0 : j)];
    const double top = *w.top_logit;
    const double distance = join_segments<q, T>(w.folds, j, segment_count, lanes);
    if (j < 0 || lane_id() % lanes != 0) return;
    w.ratios[j] = j == i ? INFINITY : ratio(top - static_cast<double>(other), distance);
    store(&p.distances_ptr[b * p.shape.n + j], w.ratios[j]);
  }
  // By a whole block: the runner-up. Every thread has the result.
  __device__ int64_t select(int64_t i) const {
    const double top = *w.top_logit;
    const auto candidate = [&](int64_t j) { return Candidate{w.ratios[j], top - logit(j), j == i ? -1 : j}; };
    return block_nearest(p.shape.n, candidate).index;
  }
  __device__ void finalize(int64_t j, const TwoRowSums& totals) const {  // by one warp
    const double gap = needs_gap<q, T>(totals) ? join_gaps<q>(w.gaps, slice_count) : sqrt(squared_gap(totals));
    if (lane_id() != 0) return;
    double scalars[kScalars];
    two_row_scalars(*w.top_logit, margin(j), w.ratios[j], totals, gap, scalars);
    for (int s = 0; s < kScalars; ++s) store(&p.scalars_ptr[s * p.shape.B + b], scalars[s]);
  }
};

template <int q, class T, bool copied>
__global__ void __launch_bounds__(copied ? kCopyWarps * kWarpSize : kThreads, copied ? 3 : 2)
    margin_geometry_fused_kernel(const __grid_constant__ Problem<T> p) {
  constexpr int kSteps = copied ? 1 : 2;  // shared memory answers at once
  const int64_t warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  for (int64_t b = blockIdx.x; b < p.shape.B; b += gridDim.x) {
    Example<q, T> example(p, b, dynamic_shared());
    if constexpr (copied) example.copy();
    const int64_t i = example.predict();
    if (threadIdx.x == 0) example.hand_on(i);
    if constexpr (copied) {
      wait_for_copies();
      __syncthreads();
    }
    const int64_t tasks = distance_tasks(p.shape.n, example.segment_count);
    for (int64_t task = warp; task < tasks; task += warps) example.template fold_rows<copied>(task, i);
    __syncthreads();
    const int lanes = joining_lanes(example.segment_count);
    for (int64_t first = 0; first < p.shape.n; first += blockDim.x / lanes) {
      const int64_t j = first + threadIdx.x / lanes;
      example.join_row(i, j < p.shape.n ? j : -1, lanes);
    }
    __syncthreads();
    const int64_t j = example.select(i);
    if (threadIdx.x == 0) example.runner_up() = j;
    const WinningRows<T> winners = example.winners(i, j);
    for (int64_t c = warp; c < example.slice_count; c += warps) {
      two_rows_task<q, T, kSteps>(c, winners, p.shape.D, example.w.two_rows);
    }
    __syncthreads();
    if (warp == 0) {
      const TwoRowSums totals = join_two_rows<q, 1>(example.w.two_rows, example.slice_count);
      if (lane_id() == 0) *example.w.totals = totals;
    }
    __syncthreads();
    if (needs_gap<q, T>(*example.w.totals)) {
      for (int64_t c = warp; c < example.slice_count; c += warps) {
        gap_task<q, T, kSteps>(c, winners, *example.w.totals, p.shape.D, example.w.gaps);
      }
      __syncthreads();
    }
    if (warp == 0) example.finalize(j, *example.w.totals);
    __syncthreads();  // the workspace is the next example's
  }
}

template <int q, class T>
__global__ void __launch_bounds__(kThreads) margin_geometry_predict_kernel(const __grid_constant__ Problem<T> p) {
  const Example<q, T> example(p, blockIdx.x);
  const int64_t i = example.predict();
  if (threadIdx.x == 0) example.hand_on(i);
}

// `blocks` blocks for each example, each of whose warps takes `rounds` tasks. Where nobody has predicted yet, they all
// do, and the first of them writes it down.
template <int q, class T>
__global__ void __launch_bounds__(kThreads, 2)
    margin_geometry_fold_kernel(const __grid_constant__ Problem<T> p, int64_t blocks, int rounds, bool predicted) {
  const Example<q, T> example(p, blockIdx.x / blocks);
  const int64_t tasks = distance_tasks(p.shape.n, example.segment_count), warps = blockDim.x / kWarpSize;
  const int64_t part = blockIdx.x % blocks, first = part * rounds * warps + threadIdx.x / kWarpSize;
  const int64_t i = predicted ? example.prediction() : example.predict();
  if (!predicted && part == 0 && threadIdx.x == 0) example.hand_on(i);
  for (int round = 0; round < rounds; ++round) {
    const int64_t task = first + round * warps;
    if (task < tasks) example.template fold_rows<false>(task, i);
  }
}

template <int q, class T>
__global__ void __launch_bounds__(kThreads, 1)
    margin_geometry_join_kernel(const __grid_constant__ Problem<T> p, int lanes) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / lanes, b = row / p.shape.n;
  const bool real_row = b < p.shape.B;
  const Example<q, T> example(p, real_row ? b : 0);
  example.join_row(example.prediction(), real_row ? row % p.shape.n : -1, lanes);
}

// The blocks of one example all select the same runner-up; the first of them writes it down.
template <int q, class T>
__global__ void __launch_bounds__(kThreads, 1)
    margin_geometry_two_rows_kernel(const __grid_constant__ Problem<T> p, int64_t blocks) {
  const Example<q, T> example(p, blockIdx.x / blocks);
  const int64_t i = example.prediction(), j = example.select(i);
  const int64_t index = blockIdx.x % blocks * kWarps + threadIdx.x / kWarpSize;
  if (threadIdx.x == 0 && index == 0) example.runner_up() = j, *example.w.arrived = 0;
  if (index < example.slice_count) {
    two_rows_task<q, T, kSliceSteps<T>>(index, example.winners(i, j), p.shape.D, example.w.two_rows);
  }
}

// The blocks of one example all join the same totals. Where the gap needs its pass, each folds a part of it, and the
// one that is last finalizes; else the first does at once.
template <int q, class T>
__global__ void __launch_bounds__(kThreads, 1)
    margin_geometry_gap_kernel(const __grid_constant__ Problem<T> p, int64_t blocks) {
  __shared__ TwoRowSums totals;
  __shared__ bool finalizes;
  const Example<q, T> example(p, blockIdx.x / blocks);
  const int64_t part = blockIdx.x % blocks, i = example.prediction(), j = example.runner_up();
  if (threadIdx.x < kWarpSize) {
    const TwoRowSums joined = join_two_rows<q, kSliceSums>(example.w.two_rows, example.slice_count);
    if (lane_id() == 0) totals = joined, finalizes = part == 0;
  }
  __syncthreads();
  if (needs_gap<q, T>(totals)) {
    const WinningRows<T> winners = example.winners(i, j);
    for (int64_t c = part * kWarps + threadIdx.x / kWarpSize; c < example.slice_count; c += blocks * kWarps) {
      gap_task<q, T, kSliceSteps<T>>(c, winners, totals, p.shape.D, example.w.gaps);
    }
    __threadfence();  // the folds of this block are seen before its arrival is
    __syncthreads();
    if (threadIdx.x == 0) {
      finalizes = atomicAdd(reinterpret_cast<unsigned long long*>(example.w.arrived), 1ull) + 1 == blocks;
    }
    __syncthreads();
    __threadfence();  // and those of the others after it
  }
  if (finalizes && threadIdx.x < kWarpSize) example.finalize(j, totals);
}

// Enough warps for `tasks`, but no round of theirs that is nearly empty.
int balanced_warps(int64_t tasks, int64_t most) { return static_cast<int>(ceil_div(tasks, ceil_div(tasks, most))); }

template <int q, class T, bool copied>
void launch_fused(const Problem<T>& p, int64_t warps, int64_t shared_bytes, const Stream& on) {
  on.launch("margin_geometry_fused_kernel", margin_geometry_fused_kernel<q, T, copied>,
            p.shape.B < INT32_MAX ? p.shape.B : INT32_MAX, static_cast<int>(warps * kWarpSize), shared_bytes, p);
}

template <int q, class T>
void launch_steps(const Problem<T>& p, bool fused, const Stream& on) {
  const int64_t B = p.shape.B, n = p.shape.n, D = p.shape.D, tasks = distance_tasks(n, segments<T>(D));
  if (fused && copies_examples(p)) {
    // Few warps a block, for many blocks: while some wait for their copies, others compute.
    const int64_t copy_bytes = n * D * sizeof(T) + D * (p.x.is_float ? sizeof(float) : sizeof(T));
    launch_fused<q, T, true>(p, balanced_warps(tasks, tasks > 8 ? kCopyWarps : 2),
                             Workspace<T>::bytes(n, D) + copy_bytes, on);
    return;
  }
  if (fused) {
    launch_fused<q, T, false>(p, balanced_warps(tasks, kWarps), Workspace<T>::bytes(n, D), on);
    return;
  }
  const int64_t warps = warps_of_block(B * tasks, kWarps), spare = B * tasks / (kManyBlocks * kWarps);
  const int64_t rounds = spare < 1 ? 1 : spare < kMostRounds ? spare : kMostRounds;
  const int64_t fold_blocks = ceil_div(tasks, warps * rounds);
  const int lanes = joining_lanes(segments<T>(D));
  const int64_t blocks = ceil_div(slices<T>(D), kWarps), gap_blocks = blocks < kGapBlocks ? blocks : kGapBlocks;
  const bool predicted = n >= kManyClasses;
  if (predicted) {
    on.launch("margin_geometry_predict_kernel", margin_geometry_predict_kernel<q, T>, B, kThreads, 0, p);
  }
  on.launch("margin_geometry_fold_kernel", margin_geometry_fold_kernel<q, T>, B * fold_blocks,
            static_cast<int>(warps * kWarpSize), 0, p, fold_blocks, static_cast<int>(rounds), predicted);
  on.launch("margin_geometry_join_kernel", margin_geometry_join_kernel<q, T>, ceil_div(B * n * lanes, kThreads),
            kThreads, 0, p, lanes);
  on.launch("margin_geometry_two_rows_kernel", margin_geometry_two_rows_kernel<q, T>, B * blocks, kThreads, 0, p,
            blocks);
  on.launch("margin_geometry_gap_kernel", margin_geometry_gap_kernel<q, T>, B * gap_blocks, kThreads, 0, p, gap_blocks);
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
    return Workspace<T>::bytes(shape.n, shape.D);
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
                            {pointer<const void>(x.data), x.dtype == kFloat32},
                            x.stride_b,
                            shape,
                            pointer<Real<T>>(scalars),
                            pointer<int64_t>(indices),
                            pointer<Real<T>>(distances),
                            pointer<char>(scratch)};
      const Stream on(stream);
      launch_steps<q.value, T>(p, fused, on);
    });
  });
}

}  // namespace fastsal
