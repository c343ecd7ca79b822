// The backward of pairwise_margins: a few columns of all rows of an example, widened to double and combined by weight.
#pragma once

#include "sums.h"

template <class T>
static void upcast(const void* from, int64_t len, double* to) {
  const T* p = static_cast<const T*>(from);
  int64_t k = 0;
  for (; k + kHalfLanes <= len; k += kHalfLanes) {
    const VecD v = load_doubles(p + k);
    __builtin_memcpy(to + k, &v, sizeof v);
  }
  for (; k < len; ++k) to[k] = as_double(p[k]);
}

constexpr int kPushVectors = kBytes == 64 ? 8 : 4;
constexpr int64_t kChunk = kPushVectors * kHalfLanes;

template <int Q>
static void push(const double* rows, int64_t n, int64_t i, const double* w, double* out) {
  VecD own[kPushVectors], sum[kPushVectors];
  for (int v = 0; v < kPushVectors; ++v) {
    own[v] = load_vector<VecD>(rows + i * kChunk + v * kHalfLanes);
    sum[v] = VecD{};
  }
  for (int64_t j = 0; j < n; ++j) {
    const VecD weight = VecD{} + w[j];
    for (int v = 0; v < kPushVectors; ++v) {
      VecD d = own[v] - load_vector<VecD>(rows + j * kChunk + v * kHalfLanes);
      if constexpr (Q == kL1) d = d > 0.0 ? VecD{} + 1.0 : d < 0.0 ? VecD{} - 1.0 : d;  // 0 and NaN stay
      sum[v] = multiply_add(weight, d, sum[v]);
    }
  }
  __builtin_memcpy(out, sum, sizeof sum);
}
