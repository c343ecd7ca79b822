// row_distances: ‖anchor - row‖_q of a few rows per example, for the streaming path.
#include <vector>

#include "parallel.h"
#include "row_norms.h"

namespace fastsal {

void row_distances(int q, const Rows& anchor, const Rows& rows, double* out, int threads) {
  const RowNorms row_norms(q, rows);
  const int64_t n_segments = row_norms.segment_count(), n_groups = row_norms.group_count(),
                per_row = rows.n * n_segments;
  std::vector<Scaled> partial(static_cast<size_t>(rows.B * per_row));
  const int64_t units = rows.B * n_groups * n_segments;
  threads = useful_threads(threads, units, rows.B * rows.n * rows.D);
  // Segments innermost: a thread walks along its rows.
  parallel_for(threads, units, 1 + units / (64 * threads), [&](int64_t unit, int) {
    const int64_t segment = unit % n_segments, group = unit / n_segments % n_groups, b = unit / n_segments / n_groups;
    row_norms.run(b, group, segment, anchor.row(b, 0), -1, partial.data() + b * per_row);
  });
  for (int64_t r = 0; r < rows.B * rows.n; ++r) {
    out[r] = to_double(norm_segments(q, partial.data() + r * n_segments, n_segments));
  }
}

}  // namespace fastsal
