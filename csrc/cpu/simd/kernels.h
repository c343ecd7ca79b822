// The table of inner loops that each SIMD level fills in. Drivers know no element types; kernels know no examples.
#pragma once

#include <stdint.h>

#include "fastsal/scalars.h"
#include "fastsal/types.h"

namespace fastsal {

constexpr int64_t kElementSize[kDtypes] = {4, 8, 2, 2};

// Rows and anchors that one call of a tile kernel takes; with two anchors or with x at most kTileRows.
constexpr int kMaxRows = 10;
constexpr int kTileRows = 4;
constexpr int kTileAnchors = 2;
constexpr int kRowsAhead = 4;

struct Strides {
  int64_t anchor, row;
};

// One segment of every pair (anchor, row): the q-sum of anchor - row goes to norm[a * anchor + r * row] and, where x
// is given (as float, or double for double rows), <x, anchor - row> to the same place in dot. `ahead` (or null) says
// where data needed soon lies, for each row.
using TileFn = void (*)(const void* const* anchors, int n_anchors, const void* const* rows, int n_rows, const void* x,
                        int64_t len, const void* const* ahead, Scaled* norm, Scaled* dot, Strides out);
// One segment of the sums of stage 2, norms still as q-sums (norm_x as p-sum). `ahead` (or null) says where data needed
// soon begins: up to kRowsAhead times the bytes of a row are prefetched.
using TwoRowFn = void (*)(const void* g, const void* row, const void* x, int64_t len, const char* ahead,
                          TwoRowSums* out);
// One segment of the q-sum of d/‖d‖ - g/‖g‖.
using GapFn = double (*)(const void* g, const void* row, int64_t len, Unit d, Unit g_unit);
using UpcastFn = void (*)(const void* from, int64_t len, double* to);
// out[k] = sum_j w[j] * phi(rows[i][k] - rows[j][k]) for one chunk of `Kernels::chunk` columns, rows [n, chunk].
using PushFn = void (*)(const double* rows, int64_t n, int64_t i, const double* w, double* out);

struct Kernels {
  const char* name;
  int block_rows;  // rows that stage 1 reads together: as many as the registers hold, for streams of memory in flight
  int64_t chunk;
  TileFn tile[3][kDtypes];
  TileFn in_turn[3][kDtypes];       // the rows one after the other: one stream of memory; one anchor, no x
  TwoRowFn two_row[3][kDtypes][2];  // [..][1]: x is float32
  GapFn gap[3][kDtypes];
  UpcastFn upcast[kDtypes];
  PushFn push[3];  // [kMax] is null
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace fastsal
