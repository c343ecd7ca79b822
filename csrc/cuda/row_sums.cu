// The pass over the rows: sums of Δ_j = anchor - row j over the segments of D, and these joined.
//
// A segment is 1024 entries of a row and the work of one warp, for a group of rows, which share the loads of the anchor
// and of x. Entry k of a segment belongs to a lane and to one of its accumulators by k alone, so that the sums have the
// same bits however the row lies in memory. The warps of a block take the same segment of other rows, so that they find
// the anchor and x in the first level cache. A lane adds at most 16 terms in float32, then everything is float64, which
// holds the square of any float32 and the product of any two. Rows of float64 are one segment, and have a block each.
#include "launch.cuh"
#include "ops.h"
#include "scaled.cuh"

namespace fastsal {
namespace {

constexpr int kWarps = 4;              // of a block
constexpr int kGroupRows = 5;          // 10, 100 and 1000 classes leave none of them idle
constexpr int kSums = 3 * kGroupRows;  // of a group, in the order of RowSums
constexpr int kPitch = kWarpSize + 4;  // of the lanes' sums in shared memory: spreads them over the banks
constexpr int kAccumulators = 2;       // of a lane for each sum: its entries go to one and the other in turn
constexpr int kPackBytes = 16;         // the widest load of a lane
constexpr int kSegment = 1024;         // entries
constexpr int kDoubleThreads = 512;
constexpr int kJoinThreads = 256;

// The row that the anchor is subtracted from where a row is the anchor itself: its Δ is the anchor.
__device__ const uint4 kZeros[kSegment * sizeof(float) / kPackBytes] = {};

// The rows, and what they are subtracted from: row own[b] of each example, or x where `own` is null.
struct Problem {
  Inputs in;
  int segments;
  const int64_t* own_ptr;  // [B]
  RowSums* sums_ptr;       // [B, n, segments]

  __device__ Entries anchor(int64_t b) const { return own_ptr ? in.row(b, own_ptr[b]) : in.x_of(b); }
};

// Adjacent entries that a lane loads at once.
template <class T, int width>
struct Pack {
  T entries[width];
};
template <class T>
constexpr int kWidth = kPackBytes / sizeof(T);

// `aligned`: the pack begins at a multiple of 16 bytes, and is so many. Entries that are not `inside` count as 0.
template <int width, bool aligned, class T>
__device__ __forceinline__ Pack<T, width> load_pack(const T* from, bool inside) {
  Pack<T, width> pack;
  if constexpr (aligned) {
#pragma unroll
    for (int word = 0; word < static_cast<int>(sizeof(pack)) / kPackBytes; ++word) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from) + word);
      memcpy(reinterpret_cast<char*>(&pack) + word * kPackBytes, &bits, kPackBytes);
    }
  } else {
#pragma unroll
    for (int c = 0; c < width; ++c) pack.entries[c] = inside ? from[c] : T{};
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
  static constexpr int kStep = kWidth<T> * kWarpSize;  // entries that the warp loads at once
  float sums[3][kGroupRows][kAccumulators] = {};       // in the order of RowSums

  // Adds what the warp takes at once from entry k on, `width` entries a lane; single ones, which may end within that,
  // for each accumulator. X is the type of x.
  template <int width, bool aligned, class X>
  __device__ __forceinline__ void add(const Segment<T>& s, int k) {
    constexpr int steps = width == 1 ? kAccumulators : 1;
    const auto is_over = [&](int step) { return width == 1 && k + step * kWarpSize >= s.length; };
    Pack<T, width> a[steps], b[steps][kGroupRows];
    Pack<X, width> x[steps];
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      if (is_over(step)) break;
      const int at = k + (step * kWarpSize + lane_id()) * width;
      const bool inside = width > 1 || at < s.length;
      x[step] = load_pack<width, aligned>(static_cast<const X*>(s.x.first) + at, inside);
      a[step] = load_pack<width, aligned>(s.anchor + at, inside);
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) b[step][r] = load_pack<width, aligned>(s.rows[r] + at, inside);
    }
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      if (is_over(step)) break;
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
        for (int c = 0; c < width; ++c) {
          const float g = real(a[step].entries[c]), d = g - real(b[step][r].entries[c]);
          const int to = (step * width + c) % kAccumulators;
          sums[0][r][to] = fold<q>(sums[0][r][to], d);
          sums[1][r][to] = fmaf(real(x[step].entries[c]), d, sums[1][r][to]);
          if (q == kL2) sums[2][r][to] = fmaf(g, d, sums[2][r][to]);
        }
      }
    }
  }
  template <class X>
  __device__ __forceinline__ void add_all(const Segment<T>& s, bool aligned) {
    int k = 0;
#pragma unroll 1
    for (; aligned && k + kStep <= s.length; k += kStep) add<kWidth<T>, true, X>(s, k);
#pragma unroll 1
    for (; k + kStep <= s.length; k += kStep) add<kWidth<T>, false, X>(s, k);
#pragma unroll 1
    for (; k < s.length; k += kAccumulators * kWarpSize) add<1, false, X>(s, k);
  }
  // Joined in float64, through the warp's shared memory: lane l has sum l / kGroupRows of row l % kGroupRows.
  __device__ __forceinline__ double total(float (*shared)[kPitch]) const {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const float (&parts)[kAccumulators] = sums[s / kGroupRows][s % kGroupRows];
      shared[s][lane_id()] = s < kGroupRows ? join<q>(parts[0], parts[1]) : parts[0] + parts[1];
    }
    __syncwarp();
    const int own = lane_id() < kSums ? lane_id() : 0;
    double sum = 0;
#pragma unroll
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const double next = shared[own][lane];
      sum = q == kMax && own < kGroupRows ? larger(sum, next) : sum + next;
    }
    return sum;
  }
};

// Whether a sum made in float32 lost nothing that counts to overflow or underflow: a term that underflows counts for
// nothing beside such a sum.
FASTSAL_HD inline bool in_range(double sum) { return fabs(sum) >= 0x1p-100 && fabs(sum) <= 0x1p120; }
template <int q>
FASTSAL_HD inline bool norm_in_range(double norm) {
  return q == kL2 ? in_range(norm) : norm <= 0x1p120;  // no magnitude underflows
}

// The sums of one segment of one row by a warp in float64, which nothing leaves.
template <int q, class T>
__device__ __forceinline__ RowSums sum_in_float64(const Segment<T>& s, const T* row) {
  RowSums sums = {};
  for (int k = lane_id(); k < s.length; k += kWarpSize) {
    const double g = real(s.anchor[k]), d = g - static_cast<double>(real(row[k]));
    sums = {fold<q>(sums.norm, d), fma(s.x_at(k), d, sums.dot), fma(g, d, sums.last)};
  }
  return {join_lanes<q>(sums.norm), join_lanes<kL1>(sums.dot), join_lanes<kL1>(sums.last)};
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

// `blocks` blocks for each example, or a block for several, with 2^log_warps warps for each. A task is one segment of
// one group of rows.
template <int q, class T>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4)
    row_sums_kernel(const __grid_constant__ Problem p, unsigned blocks, int log_warps) {
  __shared__ float lane_sums_of_warp[kWarps][kSums][kPitch];
  begin_unwritten(lane_sums_of_warp);
  const int64_t D = p.in.D, n = p.in.n;
  const int64_t b = (static_cast<int64_t>(blockIdx.x / blocks) * kWarps + warp_id()) >> log_warps;
  // 32 bits count the tasks of an example: 2^32 of them would read 70 TB.
  const unsigned groups = static_cast<unsigned>(ceil_div(n, kGroupRows));
  const unsigned warp = warp_id() & ((1 << log_warps) - 1), task = (blockIdx.x % blocks << log_warps) + warp;
  const unsigned segment = task / groups;
  const int64_t start = segment * static_cast<int64_t>(kSegment), first = task % groups * kGroupRows;
  if (start >= D || b >= p.in.B) return;
  const T *rows = static_cast<const T*>(p.in.row(b, 0).first) + start, *zeros = reinterpret_cast<const T*>(kZeros);
  const int64_t own = p.own_ptr ? p.own_ptr[b] : -1;
  Segment<T> s;
  s.length = static_cast<int>(D - start < kSegment ? D - start : kSegment);
  s.anchor = static_cast<const T*>(p.anchor(b).first) + start;
  s.x = p.in.x_of(b).from(start);
  uintptr_t addresses = reinterpret_cast<uintptr_t>(s.anchor) | reinterpret_cast<uintptr_t>(s.x.first);
  const T* row = rows + first * p.in.stride_n;
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r, row += p.in.stride_n) {
    s.rows[r] = first + r == own ? zeros : first + r < n ? row : s.anchor;
    addresses |= reinterpret_cast<uintptr_t>(s.rows[r]);
  }
  LaneSums<q, T> lane_sums;
  const bool aligned = addresses % kPackBytes == 0;
  if (sizeof(T) < sizeof(float) && s.x.dtype != kFloat32) {
    lane_sums.template add_all<T>(s, aligned);
  } else {
    lane_sums.template add_all<float>(s, aligned);
  }
  double sum = lane_sums.total(lane_sums_of_warp[warp_id()]);

  const int of_row = lane_id() % kGroupRows, which = lane_id() / kGroupRows;
  const bool is_mine = lane_id() < kSums && first + of_row < n;
  const unsigned bad =
      __ballot_sync(kAllLanes, is_mine && !(which == 0 ? norm_in_range<q>(sum) : which != 1 || in_range(sum)));
#pragma unroll 1
  for (int r = 0; bad != 0 && r < kGroupRows; ++r) {
    const bool bad_norm = bad >> r & 1u, bad_dot = bad >> (kGroupRows + r) & 1u;
    const T* again = first + r == own ? zeros : rows + (first + r) * p.in.stride_n;
    if (!(bad_norm || bad_dot) || terms_are_zero(s, again, !bad_norm)) continue;
    const RowSums exact = sum_in_float64<q>(s, again);
    if (of_row == r) sum = which == 0 ? exact.norm : which == 1 ? exact.dot : exact.last;
  }
  if (own >= first && own < first + kGroupRows) {
    double of_x = 0;
#pragma unroll 4
    for (int k = lane_id(); k < s.length; k += kWarpSize) of_x = fold<kPrimal<q>>(of_x, s.x_at(k));
    of_x = join_lanes<kPrimal<q>>(of_x);
    if (first + of_row == own && which == 2) sum = of_x;
  }
  if (p.segments == 1 && which == 0) sum = root<q>(sum);
  // The three sums of a row are a RowSums.
  if (is_mine) reinterpret_cast<double*>(p.sums_ptr + (b * n + first + of_row) * p.segments + segment)[which] = sum;
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
  return in.jacobian.dtype == kFloat64 ? 1 : static_cast<int>(ceil_div(in.D, kSegment));
}

void row_sums(const Inputs& in, uintptr_t own, uintptr_t sums, uintptr_t stream) {
  const Problem p = {in, sum_segments(in), pointer<const int64_t>(own), pointer<RowSums>(sums)};
  const int64_t rows = in.B * in.n, tasks = ceil_div(in.n, kGroupRows) * p.segments;
  const int log_warps = tasks > 2 ? 2 : tasks > 1 ? 1 : 0;
  const int64_t blocks = ceil_div(tasks, 1 << log_warps), grid = ceil_div(in.B, kWarps >> log_warps) * blocks;
  int lanes = 1;
  while (lanes < kWarpSize && lanes * 4 < p.segments) lanes *= 2;
  with_norm(in.norm, [&](auto q) {
    with_type(in.jacobian.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (std::is_same_v<T, double>) {
        launch(stream, "row_norms_double_kernel", row_norms_double_kernel<q.value>, rows, kDoubleThreads, p);
      } else {
        launch(stream, "row_sums_kernel", row_sums_kernel<q.value, T>, grid, kWarps * kWarpSize, p,
               static_cast<unsigned>(blocks), log_warps);
        if (p.segments == 1) return;
        launch(stream, "row_sums_join_kernel", row_sums_join_kernel<q.value>, ceil_div(rows * lanes, kJoinThreads),
               kJoinThreads, p, lanes);
      }
    });
  });
}

}  // namespace fastsal
