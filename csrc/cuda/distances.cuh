// Stage 1: the folds of anchor - row over chunks of D, and their sums. A warp takes one chunk of kRows rows, which
// share the loads of the anchor; the warps of a block take the same chunk of other rows, so that the anchor comes from
// L1.
#pragma once

#include "warp.cuh"

namespace fastsal {

constexpr int kRows = 4;

// Rows of one example: row j starts at `first + j * stride`.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;
  int64_t count;
};

template <int q, class T, bool aligned>
__device__ __forceinline__ double fold_chunk(const T* anchor, const T* const (&rows)[kRows], int length) {
  using L = Layout<T>;
  constexpr int kUnroll = aligned ? 2 : 1;  // entry by entry, two steps' loads would spill
  Real<T> sums[kRows][L::kAccumulators] = {};
#pragma unroll kUnroll
  for (int k = lane_id() * L::kPack; k - lane_id() * L::kPack < length; k += L::kStep) {
    const Pack<T> a = load_pack<aligned>(anchor + k, length - k);
    Pack<T> b[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) b[r] = load_pack<aligned>(rows[r] + k, length - k);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < L::kPack; ++c) {
        Real<T>& sum = sums[r][c % L::kAccumulators];
        sum = fold<q>(sum, real(a.entries[c]) - real(b[r].entries[c]));
      }
    }
  }
  double folds[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) folds[r] = join_all<q>(sums[r]);
  return join_lanes<q>(folds);
}

// The slow path of anchor - row, in float64.
template <int q, class T>
__device__ __noinline__ Fold<T> fold_chunk_safely(const T* anchor, const T* row, int length) {
  const Scaled fold = fold_safely<q, T>(
      length, [=](int64_t k) { return static_cast<double>(real(anchor[k])) - static_cast<double>(real(row[k])); });
  return FoldOf<T>::make(fold.value, fold.exponent);
}

__host__ __device__ inline int64_t distance_tasks(int64_t rows, int64_t chunks) {
  return ceil_div(rows, kRows) * chunks;
}

// Task `task` of an example: folds[j * chunks + chunk] for its rows j and its chunk. Row `skip` is left out.
template <int q, class T>
__device__ void fold_task(int64_t task, const T* anchor, Rows<T> rows, int64_t skip, int64_t D, Fold<T>* folds) {
  const int64_t groups = ceil_div(rows.count, kRows), chunk = task / groups, first = task % groups * kRows;
  const int64_t start = chunk * Layout<T>::kChunk;
  const int length = static_cast<int>(D - start < Layout<T>::kChunk ? D - start : Layout<T>::kChunk);
  const auto wanted = [&](int r) { return first + r < rows.count && first + r != skip; };
  const T* chunk_of[kRows];
  uintptr_t address = reinterpret_cast<uintptr_t>(anchor);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {  // the anchor stands in for rows that nobody wants: it costs no memory traffic
    chunk_of[r] = (wanted(r) ? rows.first + (first + r) * rows.stride : anchor) + start;
    address |= reinterpret_cast<uintptr_t>(chunk_of[r]);
  }
  anchor += start;
  const bool aligned = address % kPackBytes == 0 && D % Layout<T>::kPack == 0;
  const double fold =
      aligned ? fold_chunk<q, T, true>(anchor, chunk_of, length) : fold_chunk<q, T, false>(anchor, chunk_of, length);
  const int r = row_of_lane<kRows>(lane_id());
  const bool writes = wanted(r) && lane_id() % (kLanes / kRows) == 0, safe = in_range<q, T>(fold);
  if (writes && safe) folds[(first + r) * chunks<T>(D) + chunk] = FoldOf<T>::make(fold, 0);
  const unsigned unsafe = __ballot_sync(kAllLanes, writes && !safe);
  for (int other = 0; unsafe != 0 && other < kRows; ++other) {
    if (!(unsafe >> (other * (kLanes / kRows)) & 1u)) continue;
    const T* row = rows.first + (first + other) * rows.stride + start;
    const Fold<T> again = fold_chunk_safely<q>(anchor, row, length);
    if (lane_id() == 0) folds[(first + other) * chunks<T>(D) + chunk] = again;
  }
}

// The norm of a row from its chunks' folds, by `joining_lanes(chunks)` neighbouring lanes; rows < 0 only keep them
// company.
template <int q, class T>
__device__ __forceinline__ double join_chunks(const Fold<T>* folds, int64_t row, int64_t chunks, int lanes) {
  Fold<T> fold{};
  if (row >= 0) {
    for (int64_t chunk = lane_id() % lanes; chunk < chunks; chunk += lanes) {
      fold = join<q>(fold, folds[row * chunks + chunk]);
    }
  }
  return to_double(root<q>(FoldOf<T>::scaled(join_lanes<q>(fold, lanes))));
}

}  // namespace fastsal
