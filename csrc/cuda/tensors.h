// Tensors as the kernels see them: entries of any dtype, behind a pointer and strides in elements.
#pragma once

#include <type_traits>

#include "fastsal/half.h"

namespace fastsal {

// The type that differences are formed in. A float32 difference of float32 entries is off by 6e-8 of itself at most.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

FASTSAL_HD inline float real(float v) { return v; }
FASTSAL_HD inline double real(double v) { return v; }
FASTSAL_HD inline float real(Half v) { return to_float(v); }
FASTSAL_HD inline float real(BFloat16 v) { return to_float(v); }

// Entries of any dtype, each as float64.
struct Entries {
  const void* first;
  int dtype;

  FASTSAL_HD double operator()(int64_t k) const {
    switch (dtype) {
      case kFloat32:
        return static_cast<const float*>(first)[k];
      case kFloat64:
        return static_cast<const double*>(first)[k];
      case kFloat16:
        return real(static_cast<const Half*>(first)[k]);
      default:
        return real(static_cast<const BFloat16*>(first)[k]);
    }
  }
  FASTSAL_HD int size() const { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }  // bytes of an entry
  // From entry k on.
  FASTSAL_HD Entries from(int64_t k) const { return {static_cast<const char*>(first) + k * size(), dtype}; }
};

// Stores entry k of a tensor of any dtype, rounded to nearest even.
FASTSAL_HD inline void store(void* to, int dtype, int64_t k, double v) {
  switch (dtype) {
    case kFloat32:
      static_cast<float*>(to)[k] = static_cast<float>(v);
      break;
    case kFloat64:
      static_cast<double*>(to)[k] = v;
      break;
    case kFloat16:
      static_cast<Half*>(to)[k] = to_float16(static_cast<float>(v));
      break;
    default:
      static_cast<BFloat16*>(to)[k] = to_bfloat16(static_cast<float>(v));
  }
}

// What every operator reads. Both tensors have unit stride along D.
struct Inputs {
  int norm;          // a code of fastsal/types.h
  Entries jacobian;  // [B, n, D], or other rows
  int64_t stride_b, stride_n;
  Entries x;  // [B, D], of the Jacobian's dtype or float32; null is none
  int64_t x_stride_b;
  int64_t B, n, D;

  FASTSAL_HD Entries row(int64_t b, int64_t j) const { return jacobian.from(b * stride_b + j * stride_n); }
  FASTSAL_HD Entries x_of(int64_t b) const { return x.from(b * x_stride_b); }
};

}  // namespace fastsal
