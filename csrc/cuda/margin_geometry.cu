// margin_geometry: the sums of every row (row_sums.cu), then the runner-up and its scalars, in one launch that has a
// block or several for each example, or a thread. All give the same bits. The predicted classes come from the caller.
#include <algorithm>

#include "dispatch.cuh"
#include "fastsal/scalars.h"
#include "ops.h"
#include "row_sums.cuh"
#include "scaled.cuh"

namespace fastsal {
namespace {

constexpr int kThreads = 512;                 // promised one block a multiprocessor, ptxas spills for no architecture
constexpr int kParts = kThreads / kWarpSize;  // of the direction gap's sum, one for each warp of a block
constexpr int kShortThreads = 64;             // where each has an example of its own
constexpr int kMostBlocks = 256;              // of an example

// Where ‖g†/‖g†‖ - g/‖g‖‖² follows from <g, g†>. The cosine is off by some 4e-7, which below this square would be too
// much for its root; below this norm float32 products underflow.
constexpr double kSmallSquaredGap = 0.25, kSmallNorm = 0x1p-50;

template <class Out>
struct Problem {
  const Out* logits_ptr;  // [B, n]
  Rows rows;
  Vectors x;
  Shape shape;
  Out* scalars_ptr;      // [kScalars, B]
  int64_t* indices_ptr;  // prediction and runner_up [2, B]
  Out* distances_ptr;    // [B, n]

  __device__ double logit(int64_t b, int64_t j) const { return logits_ptr[b * shape.n + j]; }
  // Of class j with this ‖Δ_j‖; its ratio is stored.
  __device__ Candidate candidate(int64_t b, int64_t i, int64_t j, double distance) const {
    const double margin = logit(b, i) - logit(b, j), ratio_j = j == i ? INFINITY : ratio(margin, distance);
    distances_ptr[b * shape.n + j] = static_cast<Out>(ratio_j);
    return j == i ? no_candidate() : Candidate{ratio_j, margin, j};
  }
  __device__ void store_results(int64_t b, int64_t j, const double (&scalars)[kScalars]) const {
    indices_ptr[shape.B + b] = j;
    for (int s = 0; s < kScalars; ++s) scalars_ptr[s * shape.B + b] = static_cast<Out>(scalars[s]);
  }
};

// Of rows in float16, bfloat16 or float32.
struct Narrow : Problem<float> {
  RowSums* sums_ptr;          // [B, n, segments]; where several blocks join them, a row's first becomes that of the row
  Candidate* candidates_ptr;  // [B, blocks]
  int* arrived_ptr;           // [B], the blocks that have written theirs
  int segment_count;

  __device__ RowSums& sums(int64_t b, int64_t j) const { return sums_ptr[(b * shape.n + j) * segment_count]; }
};

// The sums of the prediction's row and of the runner-up's.
template <int q>
struct Winners {
  RowSums own, other;
  double norm_g, norm_d;

  __device__ Winners(const RowSums& own, const RowSums& other)
      : own(own), other(other), norm_g(root<q>(own.norm)), norm_d(root<q>(other.norm)) {}

  __device__ double squared_gap() const { return 2 - 2 * (other.last / norm_d / norm_g); }
  // Whether the direction gap takes another reading of the two rows.
  __device__ bool cancels() const {
    return !(q == kL2 && norm_g >= kSmallNorm && norm_d >= kSmallNorm && squared_gap() > kSmallSquaredGap &&
             squared_gap() < 5);
  }
  __device__ void store(const Narrow& p, int64_t b, const Candidate& best, int64_t i, double gap) const {
    const TwoRowSums sums = {{own.dot, 0}, {other.dot, 0}, {norm_g, 0}, {norm_d, 0}, {root<kPrimal<q>>(own.last), 0}};
    double scalars[kScalars];
    two_row_scalars(p.logit(b, i), best.margin, best.ratio, sums, gap, scalars);
    p.store_results(b, best.index, scalars);
  }
};

// Part `part` of the fold of d/‖d‖ - g/‖g‖, by one warp: of every kParts steps of the warp along D, one.
template <int q>
__device__ double gap_part(int part, const Narrow& p, int64_t b, int64_t i, int64_t j, double norm_g, double norm_d) {
  const Entries row_g = p.rows(b, i), row_j = p.rows(b, j);
  const double g_inverse = 1 / norm_g, d_inverse = 1 / norm_d;
  double sum = 0;
#pragma unroll 4
  for (int64_t k = part * kWarpSize + lane_id(); k < p.shape.D; k += kThreads) {
    const double g = row_g(k), d = g - row_j(k);
    sum = fold<q>(sum, fma(d, d_inverse, -(g * g_inverse)));
  }
  return join_lanes<q>(sum);
}

// `blocks` blocks for each example join its rows' sums, `lanes` threads those of a row. The last of them to arrive
// selects the runner-up.
template <int q>
__global__ void __launch_bounds__(kThreads, 1)
    margin_geometry_finish_kernel(const __grid_constant__ Narrow p, int blocks, int lanes) {
  __shared__ bool is_last;
  __shared__ double gap_parts[kParts];
  begin_unwritten(is_last);
  begin_unwritten(gap_parts);
  const int64_t n = p.shape.n, b = blockIdx.x / static_cast<unsigned>(blocks), i = p.indices_ptr[b];
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(blocks)), rows = kThreads / lanes;
  Candidate best = no_candidate();
  for (int64_t first = static_cast<int64_t>(block) * rows; first < n; first += static_cast<int64_t>(blocks) * rows) {
    const int64_t j = first + static_cast<int>(threadIdx.x) / lanes;
    const RowSums all = join_segments<q>(j < n ? &p.sums(b, j) : nullptr, p.segment_count, lanes);
    if (j >= n || (lane_id() & (lanes - 1)) != 0) continue;
    p.sums(b, j) = all;
    const Candidate other = p.candidate(b, i, j, root<q>(all.norm));
    if (is_nearer(other, best)) best = other;
  }
  best = nearest_of_block(best);
  if (blocks > 1) {
    Candidate* candidates = p.candidates_ptr + b * blocks;
    if (threadIdx.x == 0) candidates[block] = best;
    __threadfence();  // what this block wrote is seen before its arrival is
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&p.arrived_ptr[b], 1) + 1 == blocks;
    __syncthreads();
    if (!is_last) return;
    __threadfence();  // and what the others wrote, after it
    best = nearest_of_block(static_cast<int>(threadIdx.x) < blocks ? candidates[threadIdx.x] : no_candidate());
  }
  const Winners<q> winners(p.sums(b, i), p.sums(b, best.index));
  double gap = sqrt(winners.squared_gap());
  if (winners.cancels()) {
    const double sum = gap_part<q>(warp_id(), p, b, i, best.index, winners.norm_g, winners.norm_d);
    if (lane_id() == 0) gap_parts[warp_id()] = sum;
    __syncthreads();
    gap = 0;
    for (double part : gap_parts) gap = join<q>(gap, part);
    gap = root<q>(gap);
  }
  if (threadIdx.x == 0) winners.store(p, b, best, i, gap);
}

// A thread for each example, for many examples of few and short rows. A warp reads the rows of those whose gap cancels.
template <int q>
__global__ void __launch_bounds__(kShortThreads, 1)
    margin_geometry_finish_short_kernel(const __grid_constant__ Narrow p) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kShortThreads) + threadIdx.x;
  const int64_t b = index < p.shape.B ? index : p.shape.B - 1;  // surplus threads do the last again
  const int64_t i = p.indices_ptr[b];
  Candidate best = no_candidate();
  for (int64_t j = 0; j < p.shape.n; ++j) {
    const RowSums all = join_segments<q, 1>(&p.sums(b, j), p.segment_count, 1);
    const Candidate other = p.candidate(b, i, j, root<q>(all.norm));
    if (is_nearer(other, best)) best = other;
  }
  const Winners<q> winners(join_segments<q, 1>(&p.sums(b, i), p.segment_count, 1),
                           join_segments<q, 1>(&p.sums(b, best.index), p.segment_count, 1));
  double gap = sqrt(winners.squared_gap());
  unsigned cancel = __ballot_sync(kAllLanes, winners.cancels());
  for (int lane = 0; cancel != 0; ++lane, cancel >>= 1) {
    if (!(cancel & 1u)) continue;
    const int64_t b_of = from_lane(b, lane), i_of = from_lane(i, lane), j_of = from_lane(best.index, lane);
    const double norm_g = from_lane(winners.norm_g, lane), norm_d = from_lane(winners.norm_d, lane);
    double sum = 0;
    for (int part = 0; part < kParts; ++part) {
      sum = join<q>(sum, gap_part<q>(part, p, b_of, i_of, j_of, norm_g, norm_d));
    }
    if (lane_id() == lane) gap = root<q>(sum);
  }
  winners.store(p, b, best, i, gap);
}

// A block for each example of float64, whose sums have exponents of their own.
template <int q>
__global__ void __launch_bounds__(kThreads, 1)
    margin_geometry_double_kernel(const __grid_constant__ Problem<double> p, const double* norms_ptr) {
  const int64_t n = p.shape.n, D = p.shape.D, b = blockIdx.x, i = p.indices_ptr[b];
  Candidate best = no_candidate();
  for (int64_t j = threadIdx.x; j < n; j += kThreads) {
    const Candidate other = p.candidate(b, i, j, norms_ptr[b * n + j]);
    if (is_nearer(other, best)) best = other;
  }
  best = nearest_of_block(best);
  const double* row_g = static_cast<const double*>(p.rows(b, i).first);
  const double* row_j = static_cast<const double*>(p.rows(b, best.index).first);
  const double* row_x = static_cast<const double*>(p.x(b).first);
  const auto x = [=](int64_t k) { return row_x[k]; };
  const auto g = [=](int64_t k) { return row_g[k]; };
  const auto d = [=](int64_t k) { return row_g[k] - row_j[k]; };
  TwoRowSums sums;
  sums.dot_g = scaled_dot<Block>(D, x, g), sums.dot_d = scaled_dot<Block>(D, x, d);
  sums.norm_g = scaled_norm<q, Block>(D, g), sums.norm_d = scaled_norm<q, Block>(D, d);
  sums.norm_x = scaled_norm<kPrimal<q>, Block>(D, x);
  const Unit unit_g = unit_of(sums.norm_g), unit_d = unit_of(sums.norm_d);
  const double gap = root<q>(join_parts<q, Block>(D, [=](int64_t k) {
    const double of_g = g(k) * unit_g.power * unit_g.inverse;
    return fold<q>(0.0, fma(d(k) * unit_d.power, unit_d.inverse, -of_g));
  }));
  if (threadIdx.x != 0) return;
  double scalars[kScalars];
  two_row_scalars(p.logit(b, i), best.margin, best.ratio, sums, gap, scalars);
  p.store_results(b, best.index, scalars);
}

// The blocks of an example, whose threads join the segments of one row each or, `lanes` together, of fewer.
int finish_blocks(int64_t n, int segments) {
  return static_cast<int>(std::min<int64_t>(ceil_div(n, kThreads / joining_lanes(segments)), kMostBlocks));
}

}  // namespace

int64_t margin_geometry_scratch(int dtype, int64_t B, int64_t n, int64_t D) {
  if (dtype == kFloat64) return B * n * static_cast<int64_t>(sizeof(double));
  const int count = segments(D, entry_bytes(dtype));
  return B * (n * count * sizeof(RowSums) + finish_blocks(n, count) * sizeof(Candidate) + sizeof(int));
}

void margin_geometry(int norm, int dtype, uintptr_t logits, uintptr_t jacobian, int64_t stride_b, int64_t stride_n,
                     uintptr_t x, int64_t x_dtype, int64_t x_stride_b, int64_t B, int64_t n, int64_t D,
                     uintptr_t scalars, uintptr_t indices, uintptr_t distances, bool is_short, uintptr_t scratch,
                     uintptr_t stream) {
  const Stream on(stream);
  const Rows rows = {{pointer<const void>(jacobian), dtype}, stride_b, stride_n};
  const Vectors inputs = {{pointer<const void>(x), x_dtype}, x_stride_b};
  const Shape shape = {B, n, D};
  int64_t* classes = pointer<int64_t>(indices);
  if (dtype == kFloat64) {
    launch_row_norms_double(on, norm, {{}, classes, rows, inputs, shape, nullptr, nullptr}, pointer<double>(scratch));
    const Problem<double> p = {pointer<const double>(logits), rows, inputs, shape, pointer<double>(scalars), classes,
                               pointer<double>(distances)};
    with_norm(norm, [&](auto q) {
      on.launch("margin_geometry_double_kernel", margin_geometry_double_kernel<q.value>, B, kThreads, p,
                pointer<const double>(scratch));
    });
    return;
  }
  const int count = segments(D, entry_bytes(dtype)), blocks = finish_blocks(n, count), lanes = joining_lanes(count);
  RowSums* sums = pointer<RowSums>(scratch);
  Candidate* candidates = reinterpret_cast<Candidate*>(sums + B * n * count);
  int* arrived = reinterpret_cast<int*>(candidates + B * blocks);
  launch_row_sums(on, norm, dtype, {{}, classes, rows, inputs, shape, sums, arrived});
  const Problem<float> results = {pointer<const float>(logits), rows, inputs, shape, pointer<float>(scalars), classes,
                                  pointer<float>(distances)};
  const Narrow p = {results, sums, candidates, arrived, count};
  with_norm(norm, [&](auto q) {
    if (is_short && lanes == 1) {
      on.launch("margin_geometry_finish_short_kernel", margin_geometry_finish_short_kernel<q.value>,
                ceil_div(B, kShortThreads), kShortThreads, p);
    } else {
      on.launch("margin_geometry_finish_kernel", margin_geometry_finish_kernel<q.value>, B * blocks, kThreads, p,
                blocks, lanes);
    }
  });
}

}  // namespace fastsal
