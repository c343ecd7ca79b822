// The pass over the rows: sums of Δ_j = anchor - row j over the segments of D, and these joined.
//
// A segment is 4096 bytes of a row and the work of one warp, for a group of rows, which share the loads of the anchor
// and of x. Entry k of a segment belongs to a lane and to one of its accumulators by k alone, so that the sums have the
// same bits however the row lies in memory. The warps of a block take the same segment of other rows, so that they find
// the anchor and x in the first level cache. A lane adds at most 32 terms in float32, then everything is float64, which
// holds the square of any float32 and the product of any two. Rows of float64 are one segment, and have a block each.
#include "launch.cuh"
#include "ops.h"
#include "row_sums.cuh"
#include "scaled.cuh"

namespace fastsal {
namespace {

constexpr int kWarps = 4;         // of a block
constexpr int kGroupRows = 4;     // a power of two: join_lanes shares them out between the lanes
constexpr int kSteps = 2;         // whose loads are in flight at once
constexpr int kAccumulators = 2;  // of a lane for each sum: entry c of a pack goes to accumulator c % 2
constexpr int kPackBytes = 16;    // the widest load of a lane
constexpr int kSegmentBytes = 4096;
constexpr int kDoubleThreads = 512;
constexpr int kJoinThreads = 256;

template <class T>
struct Layout {
  static constexpr int kPack = kPackBytes / sizeof(T);        // adjacent entries that a lane loads at once
  static constexpr int kStep = kPack * kWarpSize;             // entries that the warp loads at once
  static constexpr int kSegment = kSegmentBytes / sizeof(T);  // entries
};

// The rows, and what they are subtracted from: row own[b] of each example, or x where `own` is null.
struct Problem {
  Inputs in;
  int segments;
  const int64_t* own_ptr;  // [B]
  RowSums* sums_ptr;       // [B, n, segments]

  __device__ Entries anchor(int64_t b) const { return own_ptr ? in.row(b, own_ptr[b]) : in.x_of(b); }
};

template <class T>
struct Pack {
  T entries[Layout<T>::kPack];
};

// What a lane loads at once; entries from `left` on count as 0. `aligned`: it begins at a multiple of 16 bytes, and the
// row's length is a multiple of a pack.
template <bool aligned, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, int left) {
  Pack<T> pack;
  if constexpr (aligned) {
    const uint4 words = left > 0 ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
    memcpy(&pack, &words, sizeof(pack));
  } else {
#pragma unroll
    for (int c = 0; c < Layout<T>::kPack; ++c) pack.entries[c] = c < left ? from[c] : T{};
  }
  return pack;
}

// One segment of the anchor, of the rows of a group, and of x.
template <class T>
struct Segment {
  const T* anchor;
  const T* rows[kGroupRows];
  Entries x;
  int length;

  __device__ double x_at(int k) const {
    const bool is_float = sizeof(T) == sizeof(float) || x.dtype == kFloat32;
    return is_float ? static_cast<const float*>(x.first)[k] : real(static_cast<const T*>(x.first)[k]);
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
        x[step][c] = load_pack<aligned>(static_cast<const X*>(s.x.first) + at + c * kXPack, left - c * kXPack);
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
FASTSAL_HD inline bool in_range(double sum) { return fabs(sum) >= 0x1p-100 && fabs(sum) <= 0x1p120; }
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

// Whether all differences of a segment are 0, as in padding, or, where the norm is in range already, x is 0 beside
// them: then the sums are what they should be. By a warp.
template <class T>
__device__ __forceinline__ bool terms_are_zero(const Segment<T>& s, const T* row, bool norm_is_known) {
  bool all = true;
#pragma unroll 4
  for (int k = lane_id(); k < s.length; k += kWarpSize) {
    all &= real(s.anchor[k]) - real(row[k]) == 0 || (norm_is_known && s.x_at(k) == 0);
  }
  return __ballot_sync(kAllLanes, !all) == 0;
}

// `blocks` blocks for each example. A task is one segment of one group of rows.
template <int q, class T>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4)
    row_sums_kernel(const __grid_constant__ Problem p, unsigned blocks) {
  using L = Layout<T>;
  const int64_t D = p.in.D, n = p.in.n, b = blockIdx.x / blocks;
  // 32 bits count the tasks of an example: 2^32 of them would read 70 TB.
  const unsigned groups = static_cast<unsigned>(ceil_div(n, kGroupRows));
  const unsigned task = blockIdx.x % blocks * kWarps + warp_id(), segment = task / groups;
  const int64_t start = segment * static_cast<int64_t>(L::kSegment), first = task % groups * kGroupRows;
  if (start >= D) return;
  const T* rows = static_cast<const T*>(p.in.row(b, 0).first) + start;
  const int64_t own = p.own_ptr ? p.own_ptr[b] : -1;
  Segment<T> s;
  s.length = static_cast<int>(D - start < L::kSegment ? D - start : L::kSegment);
  s.anchor = static_cast<const T*>(p.anchor(b).first) + start;
  s.x = p.in.x_of(b).from(start);
  uintptr_t addresses = reinterpret_cast<uintptr_t>(s.anchor) | reinterpret_cast<uintptr_t>(s.x.first);
  const T* row = rows + first * p.in.stride_n;
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r, row += p.in.stride_n) {
    s.rows[r] = first + r < n ? row : s.anchor;
    addresses |= reinterpret_cast<uintptr_t>(s.rows[r]);
  }
  LaneSums<q, T> lane_sums;
  const bool aligned = addresses % kPackBytes == 0 && D % L::kPack == 0;
  if (sizeof(T) < sizeof(float) && s.x.dtype != kFloat32) {
    aligned ? lane_sums.template add_all<true, T>(s) : lane_sums.template add_all<false, T>(s);
  } else {
    aligned ? lane_sums.template add_all<true, float>(s) : lane_sums.template add_all<false, float>(s);
  }
  RowSums sums = lane_sums.total();

  const int r = row_of_lane<kGroupRows>(lane_id());
  const bool is_other = first + r < n && first + r != own;
  const unsigned owns = __ballot_sync(kAllLanes, first + r == own);
  const unsigned bad_norms = __ballot_sync(kAllLanes, is_other && !norm_in_range<q>(sums.norm));
  const unsigned bad_dots = __ballot_sync(kAllLanes, is_other && !in_range(sums.dot));
  const unsigned again = owns | bad_norms | bad_dots;
#pragma unroll 1
  for (int other = 0; again != 0 && other < kGroupRows; ++other) {
    const unsigned bit = 1u << (other * (kWarpSize / kGroupRows));
    if ((again & bit) == 0) continue;
    const T* row = (owns & bit) != 0 ? nullptr : rows + (first + other) * p.in.stride_n;
    if (row && terms_are_zero(s, row, (bad_norms & bit) == 0)) continue;
    const RowSums exact = sum_in_float64<q>(s, row);
    if (r == other) sums = exact;
  }
  if (first + r < n && lane_id() % (kWarpSize / kGroupRows) == 0) {
    p.sums_ptr[(b * n + first + r) * p.segments + segment] = sums;
  }
}

// The sums of a row from those of its segments, by `lanes` neighbouring threads. They take the place
// of the first's.
template <int q>
__global__ void __launch_bounds__(kJoinThreads) row_sums_join_kernel(const __grid_constant__ Problem p, int lanes) {
  const int64_t row = (blockIdx.x * static_cast<int64_t>(kJoinThreads) + threadIdx.x) / lanes;
  const bool is_row = row < p.in.B * p.in.n;
  RowSums* of_segments = p.sums_ptr + row * p.segments;
  RowSums all = {};
#pragma unroll 4
  for (int segment = lane_id() & (lanes - 1); segment < (is_row ? p.segments : 0); segment += lanes) {
    const RowSums next = of_segments[segment];
    all = {join<q>(all.norm, next.norm), all.dot + next.dot, join<kPrimal<q>>(all.last, next.last)};
  }
  // The exchanges want the whole warp, and end after all lanes have read.
  all = {root<q>(join_lanes<q>(all.norm, lanes)), join_lanes<kL1>(all.dot, lanes),
         join_lanes<kPrimal<q>>(all.last, lanes)};
  if (is_row && (lane_id() & (lanes - 1)) == 0) *of_segments = all;
}

// A block for each row, of which only the norm is wanted.
template <int q>
__global__ void __launch_bounds__(kDoubleThreads) row_norms_double_kernel(const __grid_constant__ Problem p) {
  const Entries anchor = p.anchor(blockIdx.x / p.in.n), row = p.in.row(blockIdx.x / p.in.n, blockIdx.x % p.in.n);
  const Scaled norm = scaled_norm<q>(p.in.D, [=](int64_t k) { return anchor(k) - row(k); });
  if (threadIdx.x == 0) p.sums_ptr[blockIdx.x].norm = to_double(norm);
}

}  // namespace

int sum_segments(const Inputs& in) {
  return in.jacobian.dtype == kFloat64 ? 1 : static_cast<int>(ceil_div(in.D * in.jacobian.size(), kSegmentBytes));
}

void row_sums(const Inputs& in, uintptr_t own, uintptr_t sums, uintptr_t stream) {
  const Problem p = {in, sum_segments(in), pointer<const int64_t>(own), pointer<RowSums>(sums)};
  const int64_t rows = in.B * in.n, blocks = ceil_div(ceil_div(in.n, kGroupRows) * p.segments, kWarps);
  int lanes = 1;
  while (lanes < kWarpSize && lanes * 4 < p.segments) lanes *= 2;
  with_norm(in.norm, [&](auto q) {
    with_type(in.jacobian.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (std::is_same_v<T, double>) {
        launch(stream, "row_norms_double_kernel", row_norms_double_kernel<q.value>, rows, kDoubleThreads, p);
      } else {
        launch(stream, "row_sums_kernel", row_sums_kernel<q.value, T>, in.B * blocks, kWarps * kWarpSize, p,
               static_cast<unsigned>(blocks));
        launch(stream, "row_sums_join_kernel", row_sums_join_kernel<q.value>, ceil_div(rows * lanes, kJoinThreads),
               kJoinThreads, p, lanes);
      }
    });
  });
}

}  // namespace fastsal
