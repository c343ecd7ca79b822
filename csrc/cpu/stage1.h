// Stage 1: the partial q-sums of anchor - row for the rows of an example, in blocks that load the anchor once.
#pragma once

#include "ops.h"

namespace fastsal {

class Stage1 {
 public:
  Stage1(int q, const Rows& rows) : rows_(rows), tile_(kernels().tile[q][rows.dtype]), count_(segments(rows.D)) {}

  int64_t segment_count() const { return count_; }
  // Blocks of an example; with a row left out one block may be empty.
  int64_t block_count() const { return (rows_.n + kTileRows - 1) / kTileRows; }

  // One block and segment of example b. skip: a row that is left out, or -1. partial: [n, segment_count()].
  void run(int64_t b, int64_t block, int64_t segment, const char* anchor, int64_t skip, Scaled* partial) const {
    const int64_t total = rows_.n - (skip >= 0), first = block * kTileRows;
    const int64_t left = total - first, n_rows = left < kTileRows ? left : kTileRows;
    if (n_rows <= 0) return;
    const int64_t size = kElementSize[rows_.dtype], begin = segment * kSegment, offset = begin * size;
    const int64_t length = rows_.D - begin < kSegment ? rows_.D - begin : kSegment;
    const void *row[kTileRows], *ahead[kTileRows];
    Scaled* out[kTileRows];
    for (int r = 0; r < n_rows; ++r) {
      const int64_t j = index(first + r, skip);
      row[r] = rows_.row(b, j) + offset;
      out[r] = partial + j * count_ + segment;
      ahead[r] = next(b, first + r, total, skip, row[r]);
    }
    const void* a = anchor + offset;
    Scaled sums[kTileRows];
    tile_(&a, 1, row, static_cast<int>(n_rows), nullptr, length, ahead, sums, nullptr, {0, 1});
    for (int r = 0; r < n_rows; ++r) *out[r] = sums[r];
  }

  // All blocks and segments of example b.
  void run_all(int64_t b, const char* anchor, int64_t skip, Scaled* partial) const {
    // Row after row while the anchor fits in the second level cache; segment after segment beyond.
    constexpr int64_t kAnchorBytes = 512 * 1024;
    if (rows_.D * kElementSize[rows_.dtype] <= kAnchorBytes) {
      for (int64_t block = 0; block < block_count(); ++block)
        for (int64_t s = 0; s < count_; ++s) run(b, block, s, anchor, skip, partial);
    } else {
      for (int64_t s = 0; s < count_; ++s)
        for (int64_t block = 0; block < block_count(); ++block) run(b, block, s, anchor, skip, partial);
    }
  }

 private:
  static int64_t index(int64_t k, int64_t skip) { return k + (skip >= 0 && k >= skip); }

  // Where to prefetch. A long row: a little further on. A short one ends before that helps: the row a block later, which
  // may be in the next example.
  const void* next(int64_t b, int64_t k, int64_t total, int64_t skip, const void* row) const {
    constexpr int64_t kLongRow = 16384, kAheadBytes = 1024;
    if (rows_.D * kElementSize[rows_.dtype] > kLongRow) return static_cast<const char*>(row) + kAheadBytes;
    const int64_t later = k + kTileRows;
    if (later < total) return rows_.row(b, index(later, skip));
    return b + 1 < rows_.B && later - total < rows_.n ? rows_.row(b + 1, later - total) : row;
  }

  const Rows& rows_;
  TileFn tile_;
  int64_t count_;
};

}  // namespace fastsal
