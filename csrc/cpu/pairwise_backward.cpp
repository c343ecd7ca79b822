// pairwise_backward: the gradient of the Jacobian and of x from the weights w and v of the pairs, as
// fastsal.tensor.reference.pairwise_backward defines it.
#include <cmath>
#include <vector>

#include "fastsal/half.h"
#include "ops.h"
#include "parallel.h"
#include "simd/levels.h"

namespace fastsal {
namespace {

void store(char* out, Dtype dtype, int64_t at, double value) {
  switch (dtype) {
    case kFloat64:
      reinterpret_cast<double*>(out)[at] = value;
      break;
    case kFloat16:
      reinterpret_cast<Half*>(out)[at] = to_float16(static_cast<float>(value));
      break;
    case kBFloat16:
      reinterpret_cast<BFloat16*>(out)[at] = to_bfloat16(static_cast<float>(value));
      break;
    default:
      reinterpret_cast<float*>(out)[at] = static_cast<float>(value);
  }
}

// q = infinity: only the entries where |g_i - g_j| is largest, so each pair is searched first. to: [D], added to.
void add_largest(const double* own, const double* other, int64_t D, double weight, double* to) {
  double top = 0;
  int64_t count = 0;
  for (int64_t k = 0; k < D; ++k) {
    const double d = std::fabs(own[k] - other[k]);
    if (d == top) {
      ++count;
    } else if (!(d < top) && top == top) {
      top = d;
      count = 1;
    }
  }
  if (top == 0) return;
  const double share = weight / static_cast<double>(count);
  for (int64_t k = 0; k < D; ++k) {
    const double d = own[k] - other[k];
    if (top != top) {
      to[k] = NAN;
    } else if (std::fabs(d) == top) {
      to[k] += std::copysign(share, d) * (share < 0 ? -1 : 1);
    }
  }
}

}  // namespace

void pairwise_backward(int q, const double* w, const double* v, const Rows& jacobian, const Inputs& x,
                       char* grad_jacobian, double* grad_x, int threads) {
  const Kernels& level = kernels();
  const int64_t B = jacobian.B, n = jacobian.n, D = jacobian.D, size = kElementSize[jacobian.dtype];
  // Columns are handled in strips that are narrow enough for all n rows of a strip to stay in cache, in double.
  const int64_t width = q == kMax ? D : level.columns, n_strips = (D + width - 1) / width, units = B * n_strips;
  threads = useful_threads(threads, units, B * n * n * D);
  std::vector<double> rows(static_cast<size_t>(threads * n * width)), sums(static_cast<size_t>(threads * width));
  std::vector<double> x_rows(static_cast<size_t>(threads * width));

  parallel_for(threads, units, 1, [&](int64_t unit, int thread) {
    const int64_t b = unit / n_strips, begin = unit % n_strips * width, len = D - begin < width ? D - begin : width;
    double* own = rows.data() + thread * n * width;
    double* sum = sums.data() + thread * width;
    double* x_row = x_rows.data() + thread * width;
    const double* w_b = w + b * n * n;
    const double* v_b = v ? v + b * n * n : nullptr;
    for (int64_t j = 0; j < n; ++j) {
      level.upcast[jacobian.dtype](jacobian.row(b, j) + begin * size, len, own + j * width);
      for (int64_t k = len; k < width; ++k) own[j * width + k] = 0;
    }
    if (v_b) level.upcast[x.dtype](x.row(b) + begin * kElementSize[x.dtype], len, x_row);
    for (int64_t i = 0; i < n; ++i) {
      if (q == kMax) {
        for (int64_t k = 0; k < len; ++k) sum[k] = 0;
        for (int64_t j = 0; j < n; ++j) add_largest(own + i * width, own + j * width, len, w_b[i * n + j], sum);
      } else {
        level.grad_row[q](own, n, i, w_b + i * n, sum);
      }
      if (v_b) {
        double along_x = 0;
        for (int64_t j = 0; j < n; ++j) along_x += v_b[i * n + j];
        for (int64_t k = 0; k < len; ++k) sum[k] += along_x * x_row[k];
      }
      for (int64_t k = 0; k < len; ++k) store(grad_jacobian, jacobian.dtype, (b * n + i) * D + begin + k, sum[k]);
    }
    if (grad_x == nullptr) return;
    for (int64_t k = 0; k < len; ++k) sum[k] = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i + 1; j < n; ++j) {
        const double weight = v_b[i * n + j];
        for (int64_t k = 0; k < len; ++k) sum[k] += weight * (own[i * width + k] - own[j * width + k]);
      }
    }
    for (int64_t k = 0; k < len; ++k) grad_x[b * D + begin + k] = sum[k];
  });
}

}  // namespace fastsal
