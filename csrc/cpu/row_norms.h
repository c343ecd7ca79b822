// Row norms: the folds of anchor - row over the segments of an example's rows, in groups of rows that share the loads
// of the anchor; and what to prefetch meanwhile.
#pragma once

#include "ops.h"
#include "segments.h"
#include "simd/levels.h"

namespace fastsal {

// The shape of the work for one problem. Any thread may run any group and segment of it.
class RowNorms {
 public:
  RowNorms(int q, const Rows& rows)
      : rows_(rows),
        fold_rows_(kernels().fold_rows[q][rows.dtype]),
        group_rows_(kernels().group_rows),
        count_(segments(rows.D)),
        row_bytes_(rows.D * kElementSize[rows.dtype]) {
    if (!reads_few_streams() || is_small()) return;
    one_stream_ = row_bytes_ <= kLongRow;
    const bool few_rows = row_bytes_ > 2 * kLongRow;
    if (few_rows && group_rows_ > kFewRows) group_rows_ = kFewRows;
    // In a stream of two-byte elements the processor sees too little ahead of itself, between short rows too.
    const bool sees_ahead = row_bytes_ > kLongRow / 2 && kElementSize[rows.dtype] > 2;
    prefetch_ = !few_rows && !(one_stream_ && sees_ahead);
  }

  int64_t segment_count() const { return count_; }
  int64_t group_count() const { return (rows_.n + group_rows_ - 1) / group_rows_; }

  // Where a group begins of `total` rows in all. Groups are of even height: a lone last row would read at half speed.
  int64_t first_of(int64_t group, int64_t total) const {
    const int64_t whole = total / group_count(), more = total - whole * group_count();
    return group * whole + (group < more ? group : more);
  }

  // One group and segment of example b. skip: a row that is left out, or -1. partial: [n, segment_count()]. later:
  // whether soon() is prefetched by the caller.
  void run(int64_t b, int64_t group, int64_t segment, const char* anchor, int64_t skip, Scaled* partial,
           bool later = false) const {
    const int64_t total = rows_.n - (skip >= 0), first = first_of(group, total);
    const int n_rows = static_cast<int>(first_of(group + 1, total) - first);
    if (n_rows <= 0) return;
    const int64_t begin = segment * kSegment, offset = begin * kElementSize[rows_.dtype];
    const int64_t length = segment_length(begin, rows_.D);
    const void *row[kMaxRows], *a = anchor + offset;
    for (int r = 0; r < n_rows; ++r) row[r] = rows_.row(b, index(first + r, skip)) + offset;
    Scaled sums[kMaxRows];
    const Ahead ahead = {bytes_ahead(b, first, n_rows, total), row_bytes_ > kLongRow, later && first + n_rows == total};
    fold_rows_(&a, 1, row, n_rows, one_stream_, nullptr, length, ahead, sums, nullptr, {0, 1});
    for (int r = 0; r < n_rows; ++r) partial[index(first + r, skip) * count_ + segment] = sums[r];
  }

  // Short rows of the next example that are better prefetched after all groups of example b, while nothing else is
  // read: 0.93 to 1.0 of the time of ten rows of 784. Else null.
  Soon soon(int64_t b, int64_t skip) const {
    if (!prefetch_ || one_stream_ || row_bytes_ > kLongRow || b + 1 == rows_.B) return {};
    const int64_t total = rows_.n - (skip >= 0), first = first_of(group_count() - 1, total);
    const int64_t bytes = bytes_ahead(b, first, static_cast<int>(total - first), total);
    Soon soon = {};
    for (int64_t r = 0; r < kLaterRows; ++r) {
      soon.row[r] = rows_.row(b, index(total > r ? total - 1 - r : 0, skip)) + bytes;
    }
    return soon;
  }

  // All groups and segments of example b.
  void run_all(int64_t b, const char* anchor, int64_t skip, Scaled* partial, bool later) const {
    // Row after row while the anchor fits in the second level cache; segment after segment beyond.
    constexpr int64_t kAnchorBytes = 512 * 1024;
    if (row_bytes_ <= kAnchorBytes) {
      for (int64_t group = 0; group < group_count(); ++group)
        for (int64_t s = 0; s < count_; ++s) run(b, group, s, anchor, skip, partial, later);
    } else {
      for (int64_t s = 0; s < count_; ++s)
        for (int64_t group = 0; group < group_count(); ++group) run(b, group, s, anchor, skip, partial, later);
    }
  }

 private:
  static constexpr int64_t kLongRow = 16384;  // bytes
  static constexpr int kFewRows = 4;

  static int64_t index(int64_t k, int64_t skip) { return k + (skip >= 0 && k >= skip); }
  bool is_small() const { return rows_.n * row_bytes_ <= 128 * 1024; }

  // How many bytes ahead of its rows a group prefetches, as measured: in a small example the same rows of the next one;
  // of short rows the next group, or a page or two further on where they are read in one stream; along a long row a
  // little further on. The anchor is asked for as far ahead, which in a small example of margin_geometry is the next
  // one's, where the same class wins.
  int64_t bytes_ahead(int64_t b, int64_t first, int n_rows, int64_t total) const {
    constexpr int64_t kAlong = 512, kStream = 8192;
    if (!prefetch_) return 0;
    if (row_bytes_ > kLongRow) return kAlong;
    if (one_stream_) return kStream;
    if (!is_small() && first + n_rows < total) return rows_.row(b, n_rows) - rows_.row(b, 0);
    if (b + 1 == rows_.B) return 0;
    return rows_.row(b + 1, 0) - rows_.row(b, is_small() ? 0 : first);
  }

  const Rows& rows_;
  FoldRowsFn fold_rows_;
  int group_rows_;
  int64_t count_, row_bytes_;
  bool one_stream_ = false, prefetch_ = true;
};

}  // namespace fastsal
