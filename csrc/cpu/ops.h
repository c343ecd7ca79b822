// The operators behind fastsal._cpu. Strides count elements; pointers are borrowed for the call.
#pragma once

#include "fastsal/types.h"

namespace fastsal {

constexpr int64_t kElementSize[kDtypes] = {4, 8, 2, 2};

// [B, n, D] with unit stride on D.
struct Rows {
  const char* data;
  Dtype dtype;
  int64_t stride_b, stride_n, B, n, D;

  const char* row(int64_t b, int64_t j) const { return data + (b * stride_b + j * stride_n) * kElementSize[dtype]; }
};

// [B, D] in the Jacobian's dtype or float32; data is null where there is none.
struct Inputs {
  const char* data;
  Dtype dtype;
  int64_t stride_b;

  const char* row(int64_t b) const { return data + b * stride_b * kElementSize[dtype]; }
};

// [B, n], contiguous, float or double.
struct Logits {
  const void* data;
  bool is_double;

  double at(int64_t index) const {
    return is_double ? static_cast<const double*>(data)[index] : static_cast<const float*>(data)[index];
  }
};

// A result tensor of the output dtype: double for float64 Jacobians, else float.
struct Output {
  void* data;
  bool is_double;

  void set(int64_t index, double value) const {
    if (is_double) {
      static_cast<double*>(data)[index] = value;
    } else {
      static_cast<float*>(data)[index] = static_cast<float>(value);
    }
  }
};

void row_distances(int q, const Rows& anchor, const Rows& rows, double* out, int threads);
void margin_geometry(int q, const Logits& logits, const Rows& jacobian, const Inputs& x, Output scalars,
                     int64_t* indices, Output distances, int threads);
void pairwise_margins(int q, const Logits& logits, const Rows& jacobian, const Inputs& x, Output distance,
                      Output margin, Output nearest_margin, int64_t* nearest, Output projection, int threads);
void pairwise_backward(int q, const double* w, const double* v, const Rows& jacobian, const Inputs& x,
                       char* grad_jacobian, double* grad_x, int threads);

}  // namespace fastsal
