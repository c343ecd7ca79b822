// Which table of inner loops this processor runs, and how it likes its memory read.
#pragma once

#include <string>

#include "kernels.h"

namespace fastsal {

// The level in use: the best that the processor runs, unless FASTSAL_SIMD or set_simd_level names another.
const Kernels& kernels();
void set_simd_level(const std::string& name);

// Whether this processor is faster at few streams of memory: short rows one after the other, long ones four at a time
// and without prefetching.
bool reads_few_streams();
void set_reads_few_streams(bool few);

}  // namespace fastsal
