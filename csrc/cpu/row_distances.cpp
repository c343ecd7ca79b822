// row_distances: ‖anchor - row‖_q of a few rows per example, for the streaming path.
#include <vector>

#include "parallel.h"
#include "row_norms.h"

namespace fastsal {

void row_distances(int q, const Rows& anchor, const Rows& rows, double* out, int threads) {
  const RowNorms row_norms(q, rows);
  const int64_t n = rows.n, n_segments = row_norms.segment_count(), n_groups = row_norms.group_count();
  threads = useful_threads(threads, rows.B * n_groups * n_segments, rows.B * n * rows.D);
  const bool by_group = rows.B * n_groups >= 8 * threads;
  auto finish = [&](const Scaled* of, double* to, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) to[r] = to_double(norm_segments(q, of + r * n_segments, n_segments));
  };
  if (by_group) {
    PerThread<Scaled> partial(threads, n * n_segments);  // of one example, which stay in cache
    const int64_t units = rows.B * n_groups;
    parallel_for(threads, units, 1 + units / (64 * threads), [&](int64_t unit, int thread) {
      const int64_t group = unit % n_groups, b = unit / n_groups;
      Scaled* own = partial.of(thread);
      for (int64_t s = 0; s < n_segments; ++s) row_norms.run(b, group, s, anchor.row(b, 0), -1, own);
      finish(own, out + b * n, row_norms.first_of(group, n), row_norms.first_of(group + 1, n));
    });
    return;
  }
  std::vector<Scaled> partial(static_cast<size_t>(rows.B * n * n_segments));
  parallel_for(threads, rows.B * n_groups * n_segments, 1, [&](int64_t unit, int) {
    const int64_t segment = unit % n_segments, group = unit / n_segments % n_groups, b = unit / n_segments / n_groups;
    row_norms.run(b, group, segment, anchor.row(b, 0), -1, partial.data() + b * n * n_segments);
  });
  for (int64_t b = 0; b < rows.B; ++b) finish(partial.data() + b * n * n_segments, out + b * n, 0, n);
}

}  // namespace fastsal
