// Scalar maths shared by every native backend: the definitions once the reductions over D are done.
// Sums may lie outside the range of double, so they carry a power of two; the fast paths leave it at 0.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FASTSAL_HD __host__ __device__
#else
#define FASTSAL_HD
#endif

namespace fastsal {

// The dual q that measures gradients; also the codes of the Python side.
constexpr int kMax = 0, kL1 = 1, kL2 = 2;

// value * 2^exponent
struct Scaled {
  double value;
  int64_t exponent;
};

FASTSAL_HD inline double to_double(Scaled s) {
  return s.exponent == 0 ? s.value : ldexp(s.value, static_cast<int>(s.exponent));
}

// Far enough from both ends of double for any one product or quotient; no exponent to care about.
FASTSAL_HD inline bool is_plain(Scaled s) {
  const double v = fabs(s.value);
  return s.exponent == 0 && (v == 0 || (v > 0x1p-500 && v < 0x1p500));
}

FASTSAL_HD inline Scaled normalized(Scaled s) {
  if (s.value == 0 || !isfinite(s.value)) return {s.value, 0};
  int e;
  const double v = frexp(s.value, &e);
  return {v, s.exponent + e};
}

// Brings a and b to one exponent, that of the larger.
FASTSAL_HD inline void align(Scaled& a, Scaled& b) {
  if (is_plain(a) && is_plain(b)) return;
  a = normalized(a);
  b = normalized(b);
  const int64_t e = a.value == 0 ? b.exponent : b.value == 0 || a.exponent > b.exponent ? a.exponent : b.exponent;
  a = {ldexp(a.value, static_cast<int>(a.exponent - e)), e};
  b = {ldexp(b.value, static_cast<int>(b.exponent - e)), e};
}

// What a sum over D becomes in fixed order: compensated, so that the number of segments costs no accuracy.
FASTSAL_HD inline Scaled sum_segments(const Scaled* partial, int64_t count) {
  if (count == 1) return partial[0];
  double sum = 0, lost = 0;
  bool plain = true;
  for (int64_t s = 0; s < count; ++s) {
    const double v = partial[s].value, t = sum + v, back = t - sum;
    lost += (sum - (t - back)) + (v - back);
    sum = t;
    plain = plain && partial[s].exponent == 0;
  }
  if (plain && isfinite(sum)) return {sum + lost, 0};
  int64_t top = INT64_MIN;
  double naive = 0;
  bool finite = true;
  for (int64_t s = 0; s < count; ++s) {
    naive += partial[s].value;
    finite = finite && isfinite(partial[s].value);
    const Scaled p = normalized(partial[s]);
    if (p.value != 0 && p.exponent > top) top = p.exponent;
  }
  if (!finite) return {naive, 0};  // infinities and NaN as IEEE adds them
  if (top == INT64_MIN) return {0, 0};
  sum = lost = 0;
  for (int64_t s = 0; s < count; ++s) {
    const Scaled p = normalized(partial[s]);
    const double v = p.value == 0 ? 0 : ldexp(p.value, static_cast<int>(p.exponent - top));
    const double t = sum + v, back = t - sum;
    lost += (sum - (t - back)) + (v - back);
    sum = t;
  }
  return {sum + lost, top};
}

// The largest of non-negative partials; NaN wins.
FASTSAL_HD inline Scaled max_segments(const Scaled* partial, int64_t count) {
  Scaled best = partial[0];
  for (int64_t s = 1; s < count; ++s) {
    if (!(partial[s].value <= best.value) && !isnan(best.value)) best = partial[s];
  }
  return best;
}

// ‖·‖_q from its partials: sums of squares (q = 2), of absolute values (1) or maxima (infinity, exponents 0).
FASTSAL_HD inline Scaled norm_segments(int q, const Scaled* partial, int64_t count) {
  if (q == kMax) return max_segments(partial, count);
  Scaled s = sum_segments(partial, count);
  if (q == kL1) return s;
  if (s.exponent % 2 != 0) s = {s.value * 2, s.exponent - 1};
  return {sqrt(s.value), s.exponent / 2};
}

// margin / distance with 0/0 = 0: a tie is on the boundary already, whatever the gradients.
FASTSAL_HD inline double ratio(double margin, double distance) {
  return margin == 0 && distance == 0 ? 0.0 : margin / distance;
}

// torch.argmin's order: NaN first, then the smaller; equals are left to the caller.
FASTSAL_HD inline bool is_before(double a, double b) { return a < b || (isnan(a) && !isnan(b)); }

struct Candidate {
  double ratio, margin;
  int64_t index;
};

// The total order whose first element is the runner-up: ratio, then (both +inf) margin, then index.
FASTSAL_HD inline bool is_nearer(const Candidate& a, const Candidate& b) {
  if (is_before(a.ratio, b.ratio)) return true;
  if (is_before(b.ratio, a.ratio)) return false;
  if (a.ratio == INFINITY && a.margin != b.margin) return a.margin < b.margin;
  return a.index < b.index;
}

// Sums over D of the two winning rows: <x,g>, <x,d> with d = g - g_{j*}, the norms of g, d and x, and <g,d>.
struct TwoRow {
  Scaled dot_g, dot_d, norm_g, norm_d, norm_x, cross;
};

// The squared direction gap for q = 2 by way of the cosine: no second pass over the rows, good to about 1e-12 where the
// gap is not small.
FASTSAL_HD inline double squared_gap(const TwoRow& s) {
  return 2 - 2 * (s.cross.value / s.norm_d.value / s.norm_g.value);
}
constexpr double kSmallSquaredGap = 1e-3;

// v / ‖v‖ element by element is (v * power) * inverse, in range whatever the norm.
struct Unit {
  double power, inverse;
};

FASTSAL_HD inline Unit unit_of(Scaled norm) {
  if (is_plain(norm) || norm.value == 0 || !isfinite(norm.value)) return {1.0, 1.0 / norm.value};
  const Scaled s = normalized(norm);
  const int64_t k = s.exponent < -1022 ? -1022 : s.exponent > 1022 ? 1022 : s.exponent;
  return {ldexp(1.0, static_cast<int>(-k)), 1.0 / ldexp(s.value, static_cast<int>(s.exponent - k))};
}

constexpr int kScalars = 10;

struct RowScalars {
  double alignment, offset, residual, homogeneity;
};

// Of one gradient v with its score: alpha, beta, |beta| / ||v|| and the homogeneity.
FASTSAL_HD inline RowScalars row_scalars(double score, Scaled dot, Scaled norm) {
  Scaled s = {score, 0}, t = dot;
  align(s, t);
  const double beta = s.value - t.value, dot_abs = fabs(t.value), beta_abs = fabs(beta);
  return {to_double({fabs(dot.value) / norm.value, dot.exponent - norm.exponent}), to_double({beta, s.exponent}),
          to_double({beta_abs / norm.value, s.exponent - norm.exponent}), dot_abs / (dot_abs + beta_abs)};
}

// All scalars in the order of reference.SCALARS. margin is m_{j*}, rho the stage 1 ratio; the norms in `sums` are
// taken.
FASTSAL_HD inline void two_row_scalars(double psi, double margin, double rho, const TwoRow& sums, double gap,
                                       double* out) {
  const RowScalars g = row_scalars(psi, sums.dot_g, sums.norm_g);
  const RowScalars d = row_scalars(margin, sums.dot_d, sums.norm_d);
  const double spread = to_double({sums.norm_x.value * gap, sums.norm_x.exponent});
  const double bound = g.alignment + spread + d.residual;
  const double all[kScalars] = {rho,      g.alignment, margin, d.alignment,   g.offset,
                                d.offset, gap,         bound,  g.homogeneity, d.homogeneity};
  for (int s = 0; s < kScalars; ++s) out[s] = all[s];
}

}  // namespace fastsal
