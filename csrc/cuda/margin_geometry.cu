// margin_geometry: from the sums of every row (row_sums.cu) the runner-up and its scalars. The predicted classes come
// from the caller.
//
// Where rows are short, the lanes of a block's first warp select the runner-ups of several examples and make their
// scalars, some 400 instructions of a thread; rows that have to be read again are read by a warp each. Where rows are
// long, a block has one example.
#include "fastsal/scalars.h"
#include "launch.cuh"
#include "ops.h"
#include "scaled.cuh"

namespace fastsal {
namespace {

// The threads that read the rows of an example again, by D alone, since the bits of the direction gap depend on it: a
// block, or one of kWarps warps where rows are short.
constexpr int kThreads = 512, kWarps = 4;
constexpr int64_t kShortBytes = 16384;

// Where ‖g†/‖g†‖ - g/‖g‖‖² follows from <g, g†>. The cosine of rows that are constant in each lane is off by up to
// 4.7e-7, which the root of a square below this would make more than 8e-7; below this norm float32 products underflow.
constexpr double kCloseSquaredGap = 0.36, kSmallNorm = 0x1p-50;

template <class T>
struct Problem {
  using Out = Real<T>;
  Inputs in;
  int segments;
  const RowSums* sums_ptr;  // [B, n, segments], where a row's first is that of the whole row
  const Out* logits_ptr;    // [B, n]
  Out* scalars_ptr;         // [kScalars, B]
  int64_t* indices_ptr;     // prediction and runner_up [2, B]
  Out* distances_ptr;       // [B, n]

  __device__ const RowSums& sums(int64_t b, int64_t j) const { return sums_ptr[(b * in.n + j) * segments]; }
};

// What the scalars of an example follow from.
struct Found {
  double psi;
  Candidate best;
  TwoRowSums sums;
  double gap;
};

// The direction gap, or NaN where it takes another reading of the two rows.
template <int q>
__device__ double gap_of_sums(const TwoRowSums& s) {
  const double square = squared_gap(s);
  return q == kL2 && s.norm_g.value >= kSmallNorm && s.norm_d.value >= kSmallNorm && square > kCloseSquaredGap &&
                 square < 5
             ? sqrt(square)
             : NAN;
}

// 2^log_lanes threads select the runner-up of an example.
template <int q, class T>
__global__ void __launch_bounds__(kThreads, 1)
    margin_geometry_finish_kernel(const __grid_constant__ Problem<T> p, int log_lanes) {
  using Out = Real<T>;
  constexpr bool is_double = std::is_same_v<T, double>;  // its sums have exponents of their own
  __shared__ Found found[kWarpSize];
  begin_unwritten(found);
  const int lanes = 1 << log_lanes, examples = static_cast<int>(blockDim.x) >> log_lanes;
  const int64_t n = p.in.n, D = p.in.D, first = static_cast<int64_t>(blockIdx.x) * examples;
  const auto example = [&](int e) { return first + e < p.in.B ? first + e : p.in.B - 1; };
  if (threadIdx.y == 0) {
    const int thread = threadIdx.x, e = thread >> log_lanes, lane = thread & (lanes - 1);
    const int64_t b = example(e), i = p.indices_ptr[b];  // surplus lanes do the last example again
    const Out* logits = p.logits_ptr + b * n;
    const double psi = logits[i];
    Candidate best = no_candidate();
#pragma unroll 1
    for (int64_t j = lane; j < n; j += lanes) {
      const double margin = psi - logits[j], ratio_j = j == i ? INFINITY : ratio(margin, p.sums(b, j).norm);
      p.distances_ptr[b * n + j] = static_cast<Out>(ratio_j);
      const Candidate other = {ratio_j, margin, j};
      if (j != i && is_nearer(other, best)) best = other;
    }
    best = nearest_of_threads(best, lanes);
    if (lane == 0) {
      Found& f = found[e] = {psi, best};
      p.indices_ptr[p.in.B + b] = best.index;
      if constexpr (!is_double) {
        const RowSums own = p.sums(b, i), other = p.sums(b, best.index);
        f.sums = {{own.dot, 0},   {other.dot, 0}, {own.norm, 0}, {other.norm, 0}, {root<kPrimal<q>>(own.last), 0},
                  {other.last, 0}};
        f.gap = gap_of_sums<q>(f.sums);
      }
    }
  }
  __syncthreads();
  for (int e = threadIdx.y; e < examples; e += blockDim.y) {
    Found f = found[e];
    if (!is_double && f.gap >= 0) continue;
    const int64_t b = example(e);
    const T* row_g = static_cast<const T*>(p.in.row(b, p.indices_ptr[b]).first);
    const T* row_j = static_cast<const T*>(p.in.row(b, f.best.index).first);
    const auto g = [=](int64_t k) { return static_cast<double>(real(row_g[k])); };
    const auto d = [=](int64_t k) { return g(k) - real(row_j[k]); };
    if constexpr (is_double) {
      const Entries x = p.in.x_of(b);
      f.sums = {scaled_dot(D, x, g),  scaled_dot(D, x, d),           scaled_norm<q>(D, g),
                scaled_norm<q>(D, d), scaled_norm<kPrimal<q>>(D, x), {0, 0}};
    }
    const Unit unit_g = unit_of(f.sums.norm_g), unit_d = unit_of(f.sums.norm_d);
    f.gap = root<q>(join_parts<q>(D, [=](int64_t k) {
      const double of_g = g(k) * unit_g.power * unit_g.inverse;
      return fold<q>(0.0, fma(d(k) * unit_d.power, unit_d.inverse, -of_g));
    }));
    __syncwarp();  // all have read it
    if (threadIdx.x == 0) found[e] = f;
  }
  __syncthreads();
  if (threadIdx.y != 0 || static_cast<int>(threadIdx.x) >= examples) return;
  const Found f = found[threadIdx.x];
  double scalars[kScalars];
  two_row_scalars(f.psi, f.best.margin, f.best.ratio, f.sums, f.gap, scalars);
  for (int s = 0; s < kScalars; ++s) {
    p.scalars_ptr[s * p.in.B + example(threadIdx.x)] = static_cast<Out>(scalars[s]);
  }
}

}  // namespace

void margin_geometry(const Inputs& in, uintptr_t sums, uintptr_t logits, uintptr_t scalars, uintptr_t indices,
                     uintptr_t distances, uintptr_t stream) {
  const bool is_short = in.D * in.jacobian.size() <= kShortBytes;
  int log_lanes = is_short ? 0 : 9;  // 512 threads
  while (log_lanes < 5 && int64_t{4} << log_lanes < in.n) ++log_lanes;
  const dim3 threads = is_short ? dim3(kWarpSize, kWarps) : dim3(kThreads);
  with_type(in.jacobian.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Out = Real<T>;
    const Problem<T> p = {in,
                          sum_segments(in),
                          pointer<const RowSums>(sums),
                          pointer<const Out>(logits),
                          pointer<Out>(scalars),
                          pointer<int64_t>(indices),
                          pointer<Out>(distances)};
    with_norm(in.norm, [&](auto q) {
      launch(stream, "margin_geometry_finish_kernel", margin_geometry_finish_kernel<q.value, T>,
             ceil_div(in.B, threads.x >> log_lanes), threads, p, log_lanes);
    });
  });
}

}  // namespace fastsal
