// How rows of float16, bfloat16 and float32 are cut along D, and which lane gets which entry.
//
// A segment is 4096 bytes of a row and the work of one warp. Entry k of a segment belongs to a lane and to one of its
// accumulators by k alone, so that the sums of a segment have the same bits however the row lies in memory.
#pragma once

#include "fastsal/types.h"

namespace fastsal {

constexpr int kWarpSize = 32;   // lanes
constexpr int kPackBytes = 16;  // the widest load of a lane
constexpr int kSegmentBytes = 4096;

template <class T>
struct Layout {
  static constexpr int kPack = kPackBytes / sizeof(T);        // adjacent entries that a lane loads at once
  static constexpr int kStep = kPack * kWarpSize;             // entries that the warp loads at once
  static constexpr int kSegment = kSegmentBytes / sizeof(T);  // entries
};

FASTSAL_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

FASTSAL_HD inline int segments(int64_t D, int entry_bytes) {
  return static_cast<int>(ceil_div(D * entry_bytes, kSegmentBytes));
}

// How many lanes join the sums of a row's segments: lane i takes segments i, i + lanes, ..., then neighbours pair up.
FASTSAL_HD inline int joining_lanes(int segments) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes * 4 < segments) lanes *= 2;
  return lanes;
}

}  // namespace fastsal
