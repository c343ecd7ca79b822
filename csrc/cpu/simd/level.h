// All inner loops of one SIMD level, written with vector extensions, and the table of them.
//
// isa_*.cpp include this file once for each level, inside a namespace of their own, with the macros FASTSAL_LEVEL (its
// name), FASTSAL_BYTES (the width of a vector), FASTSAL_F16C and FASTSAL_FMA (what the hardware has). The headers next
// to this one belong to it and may include no others: a standard inline function compiled for AVX-512 could be the copy
// that the linker keeps for everybody.
//
// Every pair of rows sees the same sequence of operations whichever group of rows it is computed in.
#pragma once

#include "pairwise_backward.h"
#include "row_folds.h"
#include "winner_sums.h"

// Of a function that takes a norm and a type, one instance for each dtype.
#define FASTSAL_TYPES(f, q) {f<q, float>, f<q, double>, f<q, Half>, f<q, BFloat16>}
// Of winner_sums, the instances for an x of the rows' type and for one of float.
#define FASTSAL_X_TYPES(q, T) {winner_sums<q, T, T>, winner_sums<q, T, float>}
#define FASTSAL_WINNER_SUMS(q) \
  {FASTSAL_X_TYPES(q, float), FASTSAL_X_TYPES(q, double), FASTSAL_X_TYPES(q, Half), FASTSAL_X_TYPES(q, BFloat16)}

static constexpr Kernels kTable = {
    FASTSAL_LEVEL,
    kGroupRows,
    kColumns,
    {FASTSAL_TYPES(fold_rows, kMax), FASTSAL_TYPES(fold_rows, kL1), FASTSAL_TYPES(fold_rows, kL2)},
    {FASTSAL_WINNER_SUMS(kMax), FASTSAL_WINNER_SUMS(kL1), FASTSAL_WINNER_SUMS(kL2)},
    {FASTSAL_TYPES(gap, kMax), FASTSAL_TYPES(gap, kL1), FASTSAL_TYPES(gap, kL2)},
    {upcast<float>, upcast<double>, upcast<Half>, upcast<BFloat16>},
    {nullptr, grad_row<kL1>, grad_row<kL2>},
};
