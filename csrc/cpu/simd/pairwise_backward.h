// The backward of pairwise_margins: the gradient of one row in a strip of kColumns columns. All rows of the strip have
// been widened to double before, and stay in cache.
#pragma once

#include "folds.h"

template <class T>
static void upcast(const void* from, int64_t len, double* to) {
  const T* p = static_cast<const T*>(from);
  int64_t k = 0;
  for (; k + kDoubles <= len; k += kDoubles) {
    const VecD v = load_doubles(p + k);
    __builtin_memcpy(to + k, &v, sizeof v);
  }
  for (; k < len; ++k) to[k] = as_double(p[k]);
}

constexpr int kColumnVectors = kBytes == 64 ? 8 : 4;
constexpr int64_t kColumns = kColumnVectors * kDoubles;

template <int Q>
static void grad_row(const double* rows, int64_t n, int64_t i, const double* w, double* out) {
  VecD own[kColumnVectors], sum[kColumnVectors];
  for (int v = 0; v < kColumnVectors; ++v) {
    own[v] = load_vector<VecD>(rows + i * kColumns + v * kDoubles);
    sum[v] = VecD{};
  }
  for (int64_t j = 0; j < n; ++j) {
    const VecD weight = VecD{} + w[j];
    for (int v = 0; v < kColumnVectors; ++v) {
      VecD d = own[v] - load_vector<VecD>(rows + j * kColumns + v * kDoubles);
      if constexpr (Q == kL1) d = d > 0.0 ? VecD{} + 1.0 : d < 0.0 ? VecD{} - 1.0 : d;  // 0 and NaN stay
      sum[v] = multiply_add(weight, d, sum[v]);
    }
  }
  __builtin_memcpy(out, sum, sizeof sum);
}
