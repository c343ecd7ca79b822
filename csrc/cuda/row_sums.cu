// The pass over the rows: sums of Δ_j = anchor - row j over the segments of D.
//
// A warp takes one segment of a group of rows, which share the loads of the anchor and of x. The warps of a block take
// the same segment of other rows, so that they find both in the first level cache. A lane adds at most 32 terms in
// float32, then everything is float64, which holds the square of any float32 and the product of any two.
#include <algorithm>

#include "dispatch.cuh"
#include "row_sums.cuh"
#include "scaled.cuh"

namespace fastsal {
namespace {

constexpr int kMostWarps = 8;        // of a block
constexpr int64_t kFewBlocks = 264;  // two for every multiprocessor of the largest devices
constexpr int kGroupRows = 4;        // a power of two: join_lanes shares them out between the lanes
constexpr int kSteps = 2;            // whose loads are in flight at once
constexpr int kAccumulators = 2;     // of a lane for each sum: entry c of a pack goes to accumulator c % 2

// One segment of the anchor, of the rows of a group, and of x, which has the type of the rows or float32.
template <class T>
struct Segment {
  const T* anchor;
  const T* rows[kGroupRows];
  const void* x;
  bool x_is_float;
  int length;

  __device__ double x_at(int k) const {
    return x_is_float ? static_cast<const float*>(x)[k] : real(static_cast<const T*>(x)[k]);
  }
};

// A lane's sums of terms in float32.
template <int q, class T>
struct LaneSums {
  using L = Layout<T>;
  float norms[kGroupRows][kAccumulators] = {}, dots[kGroupRows][kAccumulators] = {},
        lasts[kGroupRows][kAccumulators] = {};

  // Adds `steps` steps of the warp from entry k on, whose loads are all in flight at once. X is the type of x. `whole`:
  // all entries are below s.length, from which on they count as 0. `aligned`: as in load_pack.
  template <int steps, bool whole, bool aligned, class X>
  __device__ __forceinline__ void add(const Segment<T>& s, int k) {
    constexpr int kXPack = Layout<X>::kPack, kXPacks = L::kPack / kXPack;
    Pack<T> a[steps], b[steps][kGroupRows];
    Pack<X> x[steps][kXPacks];
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      const int at = k + step * L::kStep + lane_id() * L::kPack, left = whole ? L::kPack : s.length - at;
#pragma unroll
      for (int c = 0; c < kXPacks; ++c) {
        x[step][c] = load_pack<aligned>(static_cast<const X*>(s.x) + at + c * kXPack, left - c * kXPack);
      }
      a[step] = load_pack<aligned>(s.anchor + at, left);
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) b[step][r] = load_pack<aligned>(s.rows[r] + at, left);
    }
#pragma unroll
    for (int step = 0; step < steps; ++step) {
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
        for (int c = 0; c < L::kPack; ++c) {
          const float g = real(a[step].entries[c]), d = g - real(b[step][r].entries[c]);
          const int to = c % kAccumulators;
          norms[r][to] = fold<q>(norms[r][to], d);
          dots[r][to] = fmaf(real(x[step][c / kXPack].entries[c % kXPack]), d, dots[r][to]);
          if (q == kL2) lasts[r][to] = fmaf(g, d, lasts[r][to]);
        }
      }
    }
  }
  template <bool aligned, class X>
  __device__ __forceinline__ void add_all(const Segment<T>& s) {
    int k = 0;
    if constexpr (aligned) {
      for (; k + kSteps * L::kStep <= s.length; k += kSteps * L::kStep) add<kSteps, true, true, X>(s, k);
    }
#pragma unroll 1
    for (; k < s.length; k += L::kStep) add<1, false, aligned, X>(s, k);
  }
  // Joined in float64; lane l has those of row `row_of_lane<kGroupRows>(l)`.
  __device__ __forceinline__ RowSums total() const {
    double norm[kGroupRows], dot[kGroupRows], last[kGroupRows];
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      norm[r] = join<q>(norms[r][0], norms[r][1]);
      dot[r] = dots[r][0] + dots[r][1];
      last[r] = lasts[r][0] + lasts[r][1];
    }
    return {join_lanes<q>(norm), join_lanes<kL1>(dot), q == kL2 ? join_lanes<kL1>(last) : 0};
  }
};

// Whether a sum made in float32 lost nothing that counts to overflow or underflow: a term that underflows counts for
// nothing beside such a sum.
FASTSAL_HD inline bool in_range(double sum) { return magnitude(sum) >= 0x1p-100 && magnitude(sum) <= 0x1p120; }
template <int q>
FASTSAL_HD inline bool norm_in_range(double norm) {
  return q == kL2 ? in_range(norm) : norm <= 0x1p120;  // no magnitude underflows
}

// The sums of one segment of one row by a warp in float64, which nothing leaves. A null row is the anchor's own.
template <int q, class T>
__device__ __forceinline__ RowSums sum_in_float64(const Segment<T>& s, const T* row) {
  RowSums sums = {};
  for (int k = lane_id(); k < s.length; k += kWarpSize) {
    const double g = real(s.anchor[k]), x = s.x_at(k), d = row ? g - static_cast<double>(real(row[k])) : g;
    sums = {fold<q>(sums.norm, d), fma(x, d, sums.dot), row ? fma(g, d, sums.last) : fold<kPrimal<q>>(sums.last, x)};
  }
  return {join_lanes<q>(sums.norm), join_lanes<kL1>(sums.dot), join_lanes<kPrimal<q>>(sums.last)};
}

// Whether `is_zero` holds for the entries 0 to length - 1; by a warp.
template <class IsZero>
__device__ __forceinline__ bool all_zero(int length, IsZero is_zero) {
  bool all = true;
#pragma unroll 4
  for (int k = lane_id(); k < length; k += kWarpSize) all &= is_zero(k);
  return __ballot_sync(kAllLanes, !all) == 0;
}

// `blocks` blocks for each example. A task is one segment of one group of rows.
template <int q, class T>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, 2)
    row_sums_kernel(const __grid_constant__ RowSumsProblem p, unsigned blocks) {
  using L = Layout<T>;
  const int64_t D = p.shape.D, n = p.shape.n, b = blockIdx.x / blocks;
  if (p.arrived_ptr && blockIdx.x % blocks == 0 && threadIdx.x == 0) p.arrived_ptr[b] = 0;
  // 32 bits count the tasks of an example: 2^32 of them would read 70 TB.
  const unsigned groups = static_cast<unsigned>(ceil_div(n, kGroupRows));
  const unsigned task = blockIdx.x % blocks * (blockDim.x / kWarpSize) + warp_id(), segment = task / groups;
  const int64_t start = segment * static_cast<int64_t>(L::kSegment), first = task % groups * kGroupRows;
  if (start >= D) return;
  const T* rows = static_cast<const T*>(p.rows(b, 0).first) + start;
  const int64_t own = p.own_ptr ? p.own_ptr[b] : -1;
  Segment<T> s;
  s.length = static_cast<int>(D - start < L::kSegment ? D - start : L::kSegment);
  s.anchor = static_cast<const T*>(p.anchor(b).first) + start;
  s.x = p.x(b).from(start).first;
  s.x_is_float = sizeof(T) == sizeof(float) || p.x.entries.dtype == kFloat32;
  uintptr_t addresses = reinterpret_cast<uintptr_t>(s.anchor) | reinterpret_cast<uintptr_t>(s.x);
  const T* row = rows + first * p.rows.stride_n;
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r, row += p.rows.stride_n) {
    s.rows[r] = first + r < n ? row : s.anchor;
    addresses |= reinterpret_cast<uintptr_t>(s.rows[r]);
  }
  LaneSums<q, T> lane_sums;
  const bool aligned = is_aligned(addresses) && D % L::kPack == 0;
  if (!s.x_is_float) {
    aligned ? lane_sums.template add_all<true, T>(s) : lane_sums.template add_all<false, T>(s);
  } else {
    aligned ? lane_sums.template add_all<true, float>(s) : lane_sums.template add_all<false, float>(s);
  }
  RowSums sums = lane_sums.total();

  const int r = row_of_lane<kGroupRows>(lane_id());
  const bool is_other = first + r < n && first + r != own;
  unsigned unsafe = __ballot_sync(kAllLanes, is_other && !(norm_in_range<q>(sums.norm) && in_range(sums.dot)));
  if (unsafe != 0 && all_zero(s.length, [&](int k) { return s.x_at(k) == 0; })) {
    unsafe = __ballot_sync(kAllLanes, is_other && !norm_in_range<q>(sums.norm));  // <x, Δ> is what it should be
  }
  const unsigned again = unsafe | __ballot_sync(kAllLanes, first + r == own);
#pragma unroll 1
  for (int other = 0; other < kGroupRows && again >> (other * (kWarpSize / kGroupRows)) != 0; ++other) {
    if (!(again >> (other * (kWarpSize / kGroupRows)) & 1u)) continue;
    const bool is_own = first + other == own;
    const T* row = is_own ? nullptr : rows + (first + other) * p.rows.stride_n;
    // Where all differences are 0, as in padding, the sums are what they should be.
    if (!is_own && all_zero(s.length, [&](int k) { return real(s.anchor[k]) - real(row[k]) == 0; })) continue;
    const RowSums exact = sum_in_float64<q>(s, row);
    if (r == other) sums = exact;
  }
  if (first + r < n && lane_id() % (kWarpSize / kGroupRows) == 0) {
    p.sums_ptr[(b * n + first + r) * segments(D, sizeof(T)) + segment] = sums;
  }
}

constexpr int kDoubleThreads = 512;

// A block for each row.
template <int q>
__global__ void __launch_bounds__(kDoubleThreads)
    row_norms_double_kernel(const __grid_constant__ RowSumsProblem p, double* norms_ptr) {
  const int64_t b = blockIdx.x / p.shape.n, j = blockIdx.x % p.shape.n;
  const double* anchor = static_cast<const double*>(p.anchor(b).first);
  const double* row = static_cast<const double*>(p.rows(b, j).first);
  const Scaled norm = scaled_norm<q, Block>(p.shape.D, [=](int64_t k) { return anchor[k] - row[k]; });
  if (threadIdx.x == 0) norms_ptr[blockIdx.x] = to_double(norm);
}

}  // namespace

void launch_row_sums(const Stream& on, int norm, int dtype, const RowSumsProblem& p) {
  with_narrow_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t tasks = ceil_div(p.shape.n, kGroupRows) * segments(p.shape.D, sizeof(T));
    // As many warps in a block as leave enough blocks for every multiprocessor.
    const int64_t enough = std::max<int64_t>(ceil_div(p.shape.B * tasks, kFewBlocks), 1);
    const int64_t warps = std::min<int64_t>({enough, tasks, kMostWarps}), blocks = ceil_div(tasks, warps);
    with_norm(norm, [&](auto q) {
      on.launch("row_sums_kernel", row_sums_kernel<q.value, T>, p.shape.B * blocks, static_cast<int>(warps) * kWarpSize,
                p, static_cast<unsigned>(blocks));
    });
  });
}

void launch_row_norms_double(const Stream& on, int norm, const RowSumsProblem& p, double* norms_ptr) {
  with_norm(norm, [&](auto q) {
    on.launch("row_norms_double_kernel", row_norms_double_kernel<q.value>, p.shape.B * p.shape.n, kDoubleThreads, p,
              norms_ptr);
  });
}

}  // namespace fastsal
