// Stage 1: the folds of anchor - row over the segments of D, and the norms that they make. A warp takes one segment of
// a group of rows, which share the loads of the anchor. The warps of a block take the same segment of other rows, so
// that they find the anchor in the first level cache.
#pragma once

#include "loads.cuh"
#include "scaled_folds.cuh"

namespace fastsal {

constexpr int64_t kFewBlocks = 264;  // two for every multiprocessor of the largest devices
constexpr int kGroupRows = 4;        // a power of two: join_lanes shares them out between the lanes
constexpr int kFoldSteps = 2;        // whose loads are on the way at once
constexpr int kSegmentFolds = 4;     // of a lane that joins them, likewise: all, up to 128 segments

// Rows of one example: row j starts at `first + j * stride`.
template <class T>
struct ExampleRows {
  const T* first;
  int64_t stride;
  int64_t count;
};

// The folds of one segment by a warp; lane l has that of row `row_of_lane<kGroupRows>(l)`.
template <int q, class T, Loads loads>
__device__ __forceinline__ double fold_segment(const T* anchor, const T* const (&rows)[kGroupRows], int length) {
  using L = Layout<T>;
  constexpr int kUnroll = loads == Loads::kReadOnly ? kFoldSteps : 1;  // entry by entry, two steps' loads would spill
  Real<T> sums[kGroupRows][L::kAccumulators] = {};
  // It counts what is the same for all lanes: then the compiler puts no branch between the loads of two steps.
#pragma unroll kUnroll
  for (int k = 0; k < length; k += L::kStep) {
    const int at = k + lane_id() * L::kPack;
    const Pack<T> a = load_pack<loads>(anchor + at, length - at);
    Pack<T> b[kGroupRows];
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) b[r] = load_pack<loads>(rows[r] + at, length - at);
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
      for (int c = 0; c < L::kPack; ++c) {
        Real<T>& sum = sums[r][c % L::kAccumulators];
        sum = fold<q>(sum, real(a.entries[c]) - real(b[r].entries[c]));
      }
    }
  }
  double folds[kGroupRows];
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) folds[r] = join_all<q>(sums[r]);
  return join_lanes<q>(folds);
}

// One segment of one row again, in float64, for a fold that left the range of the fast path.
template <int q, class T>
__device__ __noinline__ Fold<T> fold_segment_again(const T* anchor, const T* row, int length) {
  const Scaled fold = scaled_fold<q, T>(
      length, [=](int64_t k) { return static_cast<double>(real(anchor[k])) - static_cast<double>(real(row[k])); });
  return FoldOf<T>::make(fold.value, fold.exponent);
}

// How many warps the folds of one example keep busy.
__host__ __device__ inline int64_t distance_tasks(int64_t rows, int64_t segments) {
  return ceil_div(rows, kGroupRows) * segments;
}

// The warps of a block, at most `most`, with which `tasks` warps make enough blocks for every multiprocessor.
inline int64_t warps_of_block(int64_t tasks, int64_t most) {
  const int64_t enough = ceil_div(tasks, kFewBlocks);
  return enough < 1 ? 1 : enough < most ? enough : most;
}

// Task `task` of an example: one segment of one group, so folds[j * segments + segment] for each of its rows j. Row
// `skip` is left out. `copied`: anchor and rows are aligned copies in shared memory.
template <int q, class T, bool copied = false>
__device__ __forceinline__ void fold_task(int64_t task, const T* anchor, ExampleRows<T> rows, int64_t skip, int64_t D,
                                          Fold<T>* folds) {
  const int64_t groups = ceil_div(rows.count, kGroupRows), segment = task / groups, first = task % groups * kGroupRows;
  const int64_t start = segment * Layout<T>::kSegment;
  const int length = part_length(start, D, Layout<T>::kSegment);
  const auto wanted = [&](int r) { return first + r < rows.count && first + r != skip; };
  const T* segment_of[kGroupRows];
  uintptr_t addresses = reinterpret_cast<uintptr_t>(anchor);
  // The anchor stands in for rows that nobody wants, which costs no memory traffic.
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) {
    segment_of[r] = (wanted(r) ? rows.first + (first + r) * rows.stride : anchor) + start;
    addresses |= reinterpret_cast<uintptr_t>(segment_of[r]);
  }
  anchor += start;
  double fold;
  if constexpr (copied) {
    fold = fold_segment<q, T, Loads::kAligned>(anchor, segment_of, length);
  } else if (is_aligned(addresses) && D % Layout<T>::kPack == 0) {
    fold = fold_segment<q, T, Loads::kReadOnly>(anchor, segment_of, length);
  } else {
    fold = fold_segment<q, T, Loads::kEntries>(anchor, segment_of, length);
  }
  const int r = row_of_lane<kGroupRows>(lane_id());
  const bool writes = wanted(r) && lane_id() % (kWarpSize / kGroupRows) == 0, safe = in_range<q, T>(fold);
  if (writes && safe) folds[(first + r) * segments<T>(D) + segment] = FoldOf<T>::make(fold, 0);
  const unsigned unsafe = __ballot_sync(kAllLanes, writes && !safe);
  for (int other = 0; unsafe != 0 && other < kGroupRows; ++other) {
    if (!(unsafe >> (other * (kWarpSize / kGroupRows)) & 1u)) continue;
    const T* row = rows.first + (first + other) * rows.stride + start;
    const Fold<T> again = fold_segment_again<q>(anchor, row, length);
    if (lane_id() == 0) folds[(first + other) * segments<T>(D) + segment] = again;
  }
}

// The norm of a row from its segments' folds, by `joining_lanes(segments)` neighbouring lanes. A row < 0 is none: its
// lanes have no fold to add, but take part in the exchanges, which want the whole warp.
template <int q, class T>
__device__ __forceinline__ double join_segments(const Fold<T>* folds, int64_t row, int64_t segments, int lanes) {
  Fold<T> fold{};
  for (int64_t first = lane_id() % lanes; row >= 0 && first < segments; first += kSegmentFolds * lanes) {
    const Fold<T>* from = folds + row * segments + first;
    const int count = part_length(first, segments, kSegmentFolds * lanes);  // from here on
    Fold<T> others[kSegmentFolds];
#pragma unroll
    for (int c = 0; c < kSegmentFolds; ++c) others[c] = from[c * lanes < count ? c * lanes : 0];  // without a branch
#pragma unroll
    for (int c = 0; c < kSegmentFolds; ++c) {
      if (c * lanes < count) fold = join<q>(fold, others[c]);
    }
  }
  return to_double(root<q>(FoldOf<T>::scaled(join_lanes<q>(fold, lanes))));
}

}  // namespace fastsal
