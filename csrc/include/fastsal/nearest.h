// The rule that picks the runner-up: the ratio of a margin to a distance, and the order of the candidates.
#pragma once

#include <math.h>
#include <stdint.h>

#include "fastsal/types.h"

namespace fastsal {

// margin / distance, where 0/0 is 0: a tie is on the boundary already, whatever the gradients.
FASTSAL_HD inline double ratio(double margin, double distance) {
  return margin == 0 && distance == 0 ? 0.0 : margin / distance;
}

// The order of torch.argmin: NaN comes first, then the smaller. Equals are left to the caller.
FASTSAL_HD inline bool is_before(double a, double b) { return a < b || (isnan(a) && !isnan(b)); }

struct Candidate {
  double ratio, margin;
  int64_t index;
};

// The total order whose first element is the runner-up: by ratio, by margin where both ratios are infinite, by index.
FASTSAL_HD inline bool is_nearer(const Candidate& a, const Candidate& b) {
  if (is_before(a.ratio, b.ratio)) return true;
  if (is_before(b.ratio, a.ratio)) return false;
  if (a.ratio == INFINITY && a.margin != b.margin) return a.margin < b.margin;
  return a.index < b.index;
}

}  // namespace fastsal
