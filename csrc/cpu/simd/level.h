// All inner loops of one SIMD level, written with vector extensions, and the table of them.
//
// isa_*.cpp include this file once for each level, inside a namespace of their own, with the macros FASTSAL_LEVEL (its
// name), FASTSAL_BYTES (the width of a vector), FASTSAL_F16C and FASTSAL_FMA (what the hardware has). The headers next
// to this one belong to it and may include no others: a standard inline function compiled for AVX-512 could be the copy
// that the linker keeps for everybody.
//
// Every pair of rows sees the same sequence of operations whichever tile it is computed in.
#pragma once

#include "pairwise_backward.h"
#include "stage1.h"
#include "stage2.h"

#define FASTSAL_TYPES(f, q) {f<q, float>, f<q, double>, f<q, Half>, f<q, BFloat16>}
#define FASTSAL_TWO_ROW(q)                                                                                         \
  {                                                                                                                \
    {two_row<q, float, float>, two_row<q, float, float>}, {two_row<q, double, double>, two_row<q, double, float>}, \
        {two_row<q, Half, Half>, two_row<q, Half, float>}, {                                                       \
      two_row<q, BFloat16, BFloat16>, two_row<q, BFloat16, float>                                                  \
    }                                                                                                              \
  }

static constexpr Kernels kTable = {
    FASTSAL_LEVEL,
    kBlockRows,
    kChunk,
    {FASTSAL_TYPES(tile_entry, kMax), FASTSAL_TYPES(tile_entry, kL1), FASTSAL_TYPES(tile_entry, kL2)},
    {FASTSAL_TYPES(in_turn, kMax), FASTSAL_TYPES(in_turn, kL1), FASTSAL_TYPES(in_turn, kL2)},
    {FASTSAL_TWO_ROW(kMax), FASTSAL_TWO_ROW(kL1), FASTSAL_TWO_ROW(kL2)},
    {FASTSAL_TYPES(gap, kMax), FASTSAL_TYPES(gap, kL1), FASTSAL_TYPES(gap, kL2)},
    {upcast<float>, upcast<double>, upcast<Half>, upcast<BFloat16>},
    {nullptr, push<kL1>, push<kL2>},
};
