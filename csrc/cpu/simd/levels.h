// Which table of inner loops this processor runs, and how it likes its memory read.
#pragma once

#include <string>

#include "kernels.h"

namespace fastsal {

const Kernels& kernels();  // the level in use: the best, or what FASTSAL_SIMD or the next names
void set_simd_level(const std::string& name);

// Whether this processor is faster at few streams of memory: a short row after the other, of long ones four
// without prefetching.
bool reads_few_streams();
void set_reads_few_streams(bool few);

}  // namespace fastsal
