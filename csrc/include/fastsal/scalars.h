// From the sums over D of an example's two winning rows to its scalars.
#pragma once

#include "fastsal/scaled.h"

namespace fastsal {

// Sums over D of the two winning rows: <x,g>, <x,d> with d = g - g_{j*}, the norms of g, d and x, and <g,d>.
struct TwoRowSums {
  Scaled dot_g, dot_d, norm_g, norm_d, norm_x, cross;
};

// What makes v / ‖v‖ of v, entry by entry: (v * power) * inverse, which is in range whatever the norm.
struct Unit {
  double power, inverse;
};

FASTSAL_HD inline Unit unit_of(Scaled norm) {
  if (is_plain(norm) || norm.value == 0 || !isfinite(norm.value)) return {1.0, 1.0 / norm.value};
  const Scaled s = normalized(norm);
  const int64_t k = s.exponent < -1022 ? -1022 : s.exponent > 1022 ? 1022 : s.exponent;
  return {ldexp(1.0, static_cast<int>(-k)), 1.0 / ldexp(s.value, static_cast<int>(s.exponent - k))};
}

// The squared direction gap for q = 2 by way of the cosine: no second pass over the rows, as good as twice the sums
// that it is made of, where the gap is not small.
FASTSAL_HD inline double squared_gap(const TwoRowSums& s) {
  return 2 - 2 * (s.cross.value / s.norm_d.value / s.norm_g.value);
}

constexpr int kScalars = 11;  // in the order of fastsal.tensor.reference.SCALARS

struct RowScalars {
  double alignment, offset, residual, homogeneity;
};

// Of one gradient v and its score: the alignment, the offset beta, abs(beta) / ‖v‖ and the homogeneity.
FASTSAL_HD inline RowScalars row_scalars(double score, Scaled dot, Scaled norm) {
  Scaled s = {score, 0}, t = dot;
  align(s, t);
  const double beta = s.value - t.value, dot_abs = fabs(t.value), beta_abs = fabs(beta);
  return {to_double({fabs(dot.value) / norm.value, dot.exponent - norm.exponent}), to_double({beta, s.exponent}),
          to_double({beta_abs / norm.value, s.exponent - norm.exponent}), dot_abs / (dot_abs + beta_abs)};
}

// abs(dot) / (a b), which is at most 1 whatever the factors. The exponents go before the second quotient, so that
// nothing overflows on the way.
FASTSAL_HD inline double cosine_of(Scaled dot, Scaled a, Scaled b) {
  return to_double({fabs(dot.value) / a.value, dot.exponent - a.exponent - b.exponent}) / b.value;
}

// All scalars of an example. psi is the predicted logit, margin that of the runner-up, rho the ratio of the two that
// made it the runner-up, and gap the direction gap; the norms in `sums` have their roots.
FASTSAL_HD inline void two_row_scalars(double psi, double margin, double rho, const TwoRowSums& sums, double gap,
                                       double* out) {
  const RowScalars g = row_scalars(psi, sums.dot_g, sums.norm_g);
  const RowScalars d = row_scalars(margin, sums.dot_d, sums.norm_d);
  const double spread = to_double({sums.norm_x.value * gap, sums.norm_x.exponent});
  const double bound = g.alignment + spread + d.residual;
  const double cosine = cosine_of(sums.dot_g, sums.norm_g, sums.norm_x);
  const double all[kScalars] = {rho, g.alignment, margin,        d.alignment,   g.offset, d.offset,
                                gap, bound,       g.homogeneity, d.homogeneity, cosine};
  for (int s = 0; s < kScalars; ++s) out[s] = all[s];
}

}  // namespace fastsal
