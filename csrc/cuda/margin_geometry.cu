// margin_geometry: from the sums of every row (row_sums.cu) the runner-up and its scalars, a block for each example.
// The predicted classes come from the caller.
#include "fastsal/scalars.h"
#include "launch.cuh"
#include "ops.h"
#include "row_sums.cuh"
#include "scaled.cuh"

namespace fastsal {
namespace {

// Of a block, by D alone, since the bits of the direction gap depend on it: a warp for an example of short rows.
constexpr int kThreads = 512, kShortThreads = 32;
constexpr int64_t kShortBytes = 16384;

// Where ‖g†/‖g†‖ - g/‖g‖‖² follows from <g, g†>. The cosine is off by some 4e-7, which below this square would be too
// much for its root; below this norm float32 products underflow.
constexpr double kCloseSquaredGap = 0.25, kSmallNorm = 0x1p-50;

template <class Out>
struct Problem {
  Inputs in;
  int segments;
  const RowSums* sums_ptr;  // [B, n, segments], where a row's first is that of the whole row
  const Out* logits_ptr;    // [B, n]
  Out* scalars_ptr;         // [kScalars, B]
  int64_t* indices_ptr;     // prediction and runner_up [2, B]
  Out* distances_ptr;       // [B, n]

  __device__ const RowSums& sums(int64_t b, int64_t j) const { return sums_ptr[(b * in.n + j) * segments]; }
};

// Whether the direction gap takes another reading of the two rows.
template <int q>
__device__ bool cancels(const TwoRowSums& s) {
  return !(q == kL2 && s.norm_g.value >= kSmallNorm && s.norm_d.value >= kSmallNorm &&
           squared_gap(s) > kCloseSquaredGap && squared_gap(s) < 5);
}

// Out is float, or double where the Jacobian is, whose sums have exponents of their own.
template <int q, class Out>
__global__ void __launch_bounds__(kThreads, 1) margin_geometry_finish_kernel(const __grid_constant__ Problem<Out> p) {
  const int64_t n = p.in.n, D = p.in.D, b = blockIdx.x, i = p.indices_ptr[b];
  const Out* logits = p.logits_ptr + b * n;
  const double psi = logits[i];
  Candidate best = no_candidate();
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double margin = psi - logits[j], ratio_j = j == i ? INFINITY : ratio(margin, p.sums(b, j).norm);
    p.distances_ptr[b * n + j] = static_cast<Out>(ratio_j);
    const Candidate other = {ratio_j, margin, j};
    if (j != i && is_nearer(other, best)) best = other;
  }
  best = nearest_of_block(best);

  const Entries row_g = p.in.row(b, i), row_j = p.in.row(b, best.index), x = p.in.x_of(b);
  const auto g = [=](int64_t k) { return row_g(k); };
  const auto d = [=](int64_t k) { return row_g(k) - row_j(k); };
  constexpr bool is_double = sizeof(Out) == sizeof(double);
  TwoRowSums sums;
  if constexpr (is_double) {
    sums.dot_g = scaled_dot(D, x, g), sums.dot_d = scaled_dot(D, x, d);
    sums.norm_g = scaled_norm<q>(D, g), sums.norm_d = scaled_norm<q>(D, d), sums.norm_x = scaled_norm<kPrimal<q>>(D, x);
  } else {
    const RowSums own = p.sums(b, i), other = p.sums(b, best.index);
    sums = {{own.dot, 0},   {other.dot, 0}, {own.norm, 0}, {other.norm, 0}, {root<kPrimal<q>>(own.last), 0},
            {other.last, 0}};
  }
  double gap;
  if (is_double || cancels<q>(sums)) {
    const Unit unit_g = unit_of(sums.norm_g), unit_d = unit_of(sums.norm_d);
    gap = root<q>(join_parts<q>(D, [=](int64_t k) {
      const double g_k = row_g(k), d_k = g_k - row_j(k), of_g = g_k * unit_g.power * unit_g.inverse;
      return fold<q>(0.0, fma(d_k * unit_d.power, unit_d.inverse, -of_g));
    }));
  } else {
    gap = sqrt(squared_gap(sums));
  }
  if (threadIdx.x != 0) return;
  double scalars[kScalars];
  two_row_scalars(psi, best.margin, best.ratio, sums, gap, scalars);
  p.indices_ptr[p.in.B + b] = best.index;
  for (int s = 0; s < kScalars; ++s) p.scalars_ptr[s * p.in.B + b] = static_cast<Out>(scalars[s]);
}

template <class Out>
void launch_finish(const Inputs& in, uintptr_t sums, uintptr_t logits, uintptr_t scalars, uintptr_t indices,
                   uintptr_t distances, uintptr_t stream) {
  const Problem<Out> p = {in,
                          sum_segments(in),
                          pointer<const RowSums>(sums),
                          pointer<const Out>(logits),
                          pointer<Out>(scalars),
                          pointer<int64_t>(indices),
                          pointer<Out>(distances)};
  const int threads = in.D * in.jacobian.size() <= kShortBytes ? kShortThreads : kThreads;
  with_norm(in.norm, [&](auto q) {
    launch(stream, "margin_geometry_finish_kernel", margin_geometry_finish_kernel<q.value, Out>, in.B, threads, p);
  });
}

}  // namespace

void margin_geometry(const Inputs& in, uintptr_t sums, uintptr_t logits, uintptr_t scalars, uintptr_t indices,
                     uintptr_t distances, uintptr_t stream) {
  const auto finish = in.jacobian.dtype == kFloat64 ? launch_finish<double> : launch_finish<float>;
  finish(in, sums, logits, scalars, indices, distances, stream);
}

}  // namespace fastsal
