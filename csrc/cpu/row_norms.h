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

  // One group and segment of example b. skip: a row that is left out, or -1. partial: [n, segment_count()].
  void run(int64_t b, int64_t group, int64_t segment, const char* anchor, int64_t skip, Scaled* partial) const {
    const int64_t total = rows_.n - (skip >= 0), first = first_of(group, total);
    const int n_rows = static_cast<int>(first_of(group + 1, total) - first);
    if (n_rows <= 0) return;
    const int64_t begin = segment * kSegment, offset = begin * kElementSize[rows_.dtype];
    const int64_t length = segment_length(begin, rows_.D);
    const void *row[kMaxRows], *a = anchor + offset;
    for (int r = 0; r < n_rows; ++r) row[r] = rows_.row(b, index(first + r, skip)) + offset;
    Scaled sums[kMaxRows];
    fold_rows_(&a, 1, row, n_rows, one_stream_, nullptr, length, ahead(b, first, n_rows, total, skip), sums, nullptr,
               {0, 1});
    for (int r = 0; r < n_rows; ++r) partial[index(first + r, skip) * count_ + segment] = sums[r];
  }

  // The row of the next example that all groups of example b, which leave out one, do not prefetch in sequence; else
  // null.
  const void* left_for_later(int64_t b) const {
    return in_sequence() && b + 1 < rows_.B ? rows_.row(b + 1, rows_.n - 1) : nullptr;
  }

  // All groups and segments of example b.
  void run_all(int64_t b, const char* anchor, int64_t skip, Scaled* partial) const {
    // Row after row while the anchor fits in the second level cache; segment after segment beyond.
    constexpr int64_t kAnchorBytes = 512 * 1024;
    if (row_bytes_ <= kAnchorBytes) {
      for (int64_t group = 0; group < group_count(); ++group)
        for (int64_t s = 0; s < count_; ++s) run(b, group, s, anchor, skip, partial);
    } else {
      for (int64_t s = 0; s < count_; ++s)
        for (int64_t group = 0; group < group_count(); ++group) run(b, group, s, anchor, skip, partial);
    }
  }

 private:
  static constexpr int64_t kLongRow = 16384;  // bytes
  static constexpr int kFewRows = 4;

  static int64_t index(int64_t k, int64_t skip) { return k + (skip >= 0 && k >= skip); }
  bool is_small() const { return rows_.n * row_bytes_ <= 128 * 1024; }

  // Whether examples are small, and their rows short and one behind the other.
  bool in_sequence() const { return is_small() && row_bytes_ <= kLongRow && rows_.stride_n == rows_.D; }

  // What a group prefetches, as measured: along a long row a little further on; of short rows the next group, or a page
  // or two further on where they are read in one stream; in a small example its share of the next one. In sequence that
  // takes 0.82 to 0.96 of the time of side by side on a Zen 5, for ten rows of 784 or 3072. The anchor of other orders
  // is asked for as far ahead.
  Ahead ahead(int64_t b, int64_t first, int n_rows, int64_t total, int64_t skip) const {
    constexpr int64_t kAlong = 512, kStream = 8192;
    if (!prefetch_) return {};
    if (row_bytes_ > kLongRow) return {kAlong, Order::kAlong};
    if (one_stream_) return {kStream, Order::kSideBySide};
    if (!is_small() && first + n_rows < total) {
      return {rows_.row(b, n_rows) - rows_.row(b, 0), Order::kSideBySide};
    }
    if (b + 1 == rows_.B) return {};
    if (in_sequence()) return {rows_.row(b + 1, first) - rows_.row(b, index(first, skip)), Order::kInSequence};
    return {rows_.row(b + 1, 0) - rows_.row(b, is_small() ? 0 : first), Order::kSideBySide};
  }

  const Rows& rows_;
  FoldRowsFn fold_rows_;
  int group_rows_;
  int64_t count_, row_bytes_;
  bool one_stream_ = false, prefetch_ = true;
};

}  // namespace fastsal
