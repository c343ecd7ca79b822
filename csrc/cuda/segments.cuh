// How stages 1 and 2 cut rows along D, and which lane gets which entry.
//
// A segment of stage 1 has 4096 bytes and is the work of one warp, as a slice of stage 2 is, which may be shorter.
// Entry k of a segment belongs to a lane and to one of its accumulators by k alone, so that the sum of a segment has
// the same bits however the row lies in memory.
#pragma once

#include "fastsal/types.h"

namespace fastsal {

constexpr int kWarpSize = 32;   // lanes
constexpr int kPackBytes = 16;  // the widest load of a lane
constexpr int kSegmentBytes = 4096;
// Stage 2 has two rows and x only: it cuts rows up to kShortBytes finer, so that more warps share them.
constexpr int kShortBytes = 16384, kShortSliceBytes = 1024;
// Where few warps read, all of a slice is on its way at once: of narrow entries, which become float64, twice as many
// would spill.
template <class T>
constexpr int kSliceBytes = sizeof(T) < sizeof(float) ? 2048 : 4096;

template <class T>
struct Layout {
  static constexpr int kPack = kPackBytes / sizeof(T);         // adjacent entries that a lane loads at once
  static constexpr int kStep = kPack * kWarpSize;              // entries that the warp loads at once
  static constexpr int kSegment = kSegmentBytes / sizeof(T);   // at most 16 additions to a float32 accumulator
  static constexpr int kAccumulators = kPack < 4 ? kPack : 4;  // entry c of a pack goes to accumulator c % 4
};

FASTSAL_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
FASTSAL_HD inline int64_t segments(int64_t D) {
  return ceil_div(D, Layout<T>::kSegment);
}

// The entries of a slice of stage 2, and how many slices there are.
template <class T>
FASTSAL_HD inline int64_t slice(int64_t D) {
  return (D * static_cast<int64_t>(sizeof(T)) <= kShortBytes ? kShortSliceBytes : kSliceBytes<T>) / sizeof(T);
}
template <class T>
FASTSAL_HD inline int64_t slices(int64_t D) {
  return ceil_div(D, slice<T>(D));
}

// How many entries the part of `size` that begins at `start` has: fewer than the others where it is the last.
FASTSAL_HD inline int part_length(int64_t start, int64_t D, int64_t size) {
  return static_cast<int>(D - start < size ? D - start : size);
}

// How many lanes join the folds of a row's segments: lane i takes segments i, i + lanes, ..., then neighbours pair up.
FASTSAL_HD inline int joining_lanes(int64_t segments) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes * 4 < segments) lanes *= 2;
  return lanes;
}

}  // namespace fastsal
