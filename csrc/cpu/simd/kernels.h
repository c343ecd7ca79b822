// The table of inner loops that each SIMD level fills in. Its functions know nothing of examples; those who call them
// know nothing of the elements' types.
#pragma once

#include <stdint.h>

#include "fastsal/half.h"
#include "fastsal/scalars.h"
#include "fastsal/types.h"

namespace fastsal {

// One call of fold_rows takes at most so many rows of one anchor; with two anchors, or with x, at most kPairRows.
constexpr int kMaxRows = 10;
constexpr int kPairRows = 4;
constexpr int kMaxAnchors = 2;

struct Strides {
  int64_t anchor, row;
};

// What a group of rows asks memory for while it is folded: what comes next of the same anchor and rows, needed at once;
// as many other rows, side by side like these; or as many that follow one another, line after line.
enum class Order { kAlong, kSideBySide, kInSequence };
// How many bytes after anchor and rows that lies (in sequence, after the first row), or 0 for nothing.
struct Ahead {
  int64_t bytes;
  Order order;
};

// An x and a row that are needed soon, or null.
struct Soon {
  const void *x, *row;
};

// The rows of a group share the loads of an anchor. For one segment of every pair (anchor, row), the fold of
// anchor - row goes to norm[a * out.anchor + r * out.row] and, where x is given (as float, or as double for double
// rows), <x, anchor - row> to the same place in dot. `one_stream`, with one anchor and without x, reads row after row
// and not all rows side by side.
using FoldRowsFn = void (*)(const void* const* anchors, int n_anchors, const void* const* rows, int n_rows,
                            bool one_stream, const void* x, int64_t len, Ahead ahead, Scaled* norm, Scaled* dot,
                            Strides out);
// One segment of the winner sums; the norms are still folds, that of x with the perturbation's p.
using WinnerSumsFn = void (*)(const void* g, const void* row, const void* x, int64_t len, const Soon& soon,
                              TwoRowSums* out);
// One segment of the fold of d/‖d‖ - g/‖g‖.
using GapFn = double (*)(const void* g, const void* row, int64_t len, Unit d, Unit g_unit);
using UpcastFn = void (*)(const void* from, int64_t len, double* to);
// Row i's gradient from the weights of its pairs: out[k] = sum_j w[j] * phi(rows[i][k] - rows[j][k]), where phi(d)
// is d for q = 2 and its sign for q = 1, for one strip of `Kernels::columns` columns; rows is [n, columns].
using GradRowFn = void (*)(const double* rows, int64_t n, int64_t i, const double* w, double* out);

// The tables are indexed by norm (kMax, kL1, kL2) and dtype.
struct Kernels {
  const char* name;
  int group_rows;  // rows that are read together: as many as the registers hold, for streams of memory in flight
  int64_t columns;
  FoldRowsFn fold_rows[3][kDtypes];
  WinnerSumsFn winner_sums[3][kDtypes][2];  // [..][1]: x is float32
  GapFn gap[3][kDtypes];
  UpcastFn upcast[kDtypes];
  GradRowFn grad_row[3];  // null at kMax, where a strip of columns is not enough to know phi
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace fastsal
