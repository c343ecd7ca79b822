// pairwise_margins: the fold of g_i - g_j and <x, g_i - g_j> of all pairs i < j, by direct differences. A tile is a set
// of rows that stay in cache; a thread takes the pairs of two tiles.
#include <algorithm>
#include <vector>

#include "fastsal/nearest.h"
#include "ops.h"
#include "parallel.h"
#include "segments.h"
#include "simd/levels.h"

namespace fastsal {
namespace {

// Everything of one example that its pairs need.
struct Pairs {
  int q;
  const Logits& logits;
  const Rows& jacobian;
  const Inputs& x;
  Output distance, margin, nearest_margin;
  int64_t* nearest;
  Output projection;
  FoldRowsFn fold_rows;
  int64_t n_segments, tile_rows;

  int64_t tiles() const { return (jacobian.n + tile_rows - 1) / tile_rows; }

  double logit(int64_t b, int64_t j) const { return logits.at(b * jacobian.n + j); }

  double ratio_of(int64_t b, int64_t i, int64_t j, double norm) const { return ratio(logit(b, i) - logit(b, j), norm); }

  // x of example b as the type the kernels compute in.
  void upcast_x(int64_t b, std::vector<char>& out) const {
    const int64_t D = jacobian.D;
    if (jacobian.dtype == kFloat64) {
      kernels().upcast[x.dtype](x.row(b), D, reinterpret_cast<double*>(out.data()));
      return;
    }
    double buffer[256];
    auto* to = reinterpret_cast<float*>(out.data());
    for (int64_t k = 0; k < D; k += 256) {
      const int64_t len = std::min<int64_t>(256, D - k);
      kernels().upcast[x.dtype](x.row(b) + k * kElementSize[x.dtype], len, buffer);
      for (int64_t l = 0; l < len; ++l) to[k + l] = static_cast<float>(buffer[l]);
    }
  }

  // The pairs i < j with i in tile ti and j in tile tj: rows are read once a segment. scratch: [pairs,
  // segments] for norms and, with x, as much for dot products. norms: [n, n], both triangles are written.
  void run_tile(int64_t b, int64_t ti, int64_t tj, const char* x_row, Scaled* scratch, double* norms) const {
    const int64_t n = jacobian.n, i0 = ti * tile_rows, j0 = tj * tile_rows;
    const int64_t i1 = std::min(n, i0 + tile_rows), j1 = std::min(n, j0 + tile_rows);
    Scaled* dot_scratch = scratch + tile_rows * tile_rows * n_segments;
    const Strides strides = {tile_rows * n_segments, n_segments};
    const int64_t size = kElementSize[jacobian.dtype], x_size = jacobian.dtype == kFloat64 ? 8 : 4;
    for (int64_t s = 0; s < n_segments; ++s) {
      const int64_t begin = s * kSegment, length = segment_length(begin, jacobian.D);
      const void* x_at = x_row ? x_row + begin * x_size : nullptr;
      for (int64_t i = i0; i < i1;) {
        // On the diagonal one row at a time: two anchors would also form pairs i >= j.
        const int anchors = ti != tj && i + kMaxAnchors <= i1 ? kMaxAnchors : 1;
        const void* anchor[kMaxAnchors];
        for (int a = 0; a < anchors; ++a) anchor[a] = jacobian.row(b, i + a) + begin * size;
        for (int64_t j = ti == tj ? i + 1 : j0; j < j1; j += kPairRows) {
          const int n_rows = static_cast<int>(std::min<int64_t>(kPairRows, j1 - j));
          const void* row[kPairRows];
          for (int r = 0; r < n_rows; ++r) row[r] = jacobian.row(b, j + r) + begin * size;
          const int64_t at = ((i - i0) * tile_rows + (j - j0)) * n_segments + s;
          fold_rows(anchor, anchors, row, n_rows, false, x_at, length, {}, scratch + at, dot_scratch + at, strides);
        }
        i += anchors;
      }
    }
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t j = ti == tj ? i + 1 : j0; j < j1; ++j) {
        const int64_t at = ((i - i0) * tile_rows + (j - j0)) * n_segments;
        const Scaled norm = norm_segments(q, scratch + at, n_segments);
        norms[i * n + j] = norms[j * n + i] = to_double(norm);
        if (x_row == nullptr) continue;
        const Scaled dot = sum_segments(dot_scratch + at, n_segments);
        const double value = to_double({dot.value / norm.value, dot.exponent - norm.exponent});
        projection.set((b * n + i) * n + j, value);
        projection.set((b * n + j) * n + i, -value);
      }
    }
  }

  // Row i of the results from the norms [n, n].
  void finish_row(int64_t b, int64_t i, const double* norms) const {
    const int64_t n = jacobian.n, at = (b * n + i) * n;
    Candidate best = {0, 0, -1};
    for (int64_t j = 0; j < n; ++j) {
      if (j == i) {
        distance.set(at + j, 0);
        margin.set(at + j, INFINITY);
        if (x.data) projection.set(at + j, NAN);
        continue;
      }
      const double difference = logit(b, i) - logit(b, j), norm = norms[i * n + j];
      const Candidate candidate = {ratio(difference, norm), difference, j};
      distance.set(at + j, norm);
      margin.set(at + j, candidate.ratio);
      if (best.index < 0 || is_nearer(candidate, best)) best = candidate;
    }
    nearest_margin.set(b * n + i, best.ratio);
    nearest[b * n + i] = best.index;
  }
};

}  // namespace

void pairwise_margins(int q, const Logits& logits, const Rows& jacobian, const Inputs& x, Output distance,
                      Output margin, Output nearest_margin, int64_t* nearest, Output projection, int threads) {
  const int64_t B = jacobian.B, n = jacobian.n, D = jacobian.D;
  // Two tiles of a segment stay in the second level cache.
  constexpr int64_t kCacheBytes = 768 * 1024;
  const int64_t row_bytes = std::min(D, kSegment) * kElementSize[jacobian.dtype];
  const int64_t fitting = std::max<int64_t>(kPairRows, kCacheBytes / 2 / row_bytes / kPairRows * kPairRows);
  const Pairs pairs = {q,
                       logits,
                       jacobian,
                       x,
                       distance,
                       margin,
                       nearest_margin,
                       nearest,
                       projection,
                       kernels().fold_rows[q][jacobian.dtype],
                       segments(D),
                       std::min<int64_t>(std::min<int64_t>(fitting, 64), n)};
  const int64_t n_tiles = pairs.tiles(), n_pairs = n_tiles * (n_tiles + 1) / 2;
  threads = useful_threads(threads, B * n_pairs, B * n * n * D / 2);
  const bool by_example = threads == 1 || B >= 4 * threads;

  std::vector<std::pair<int64_t, int64_t>> tile_pairs;
  for (int64_t ti = 0; ti < n_tiles; ++ti)
    for (int64_t tj = ti; tj < n_tiles; ++tj) tile_pairs.emplace_back(ti, tj);
  const int copies = by_example ? threads : 1;
  PerThread<Scaled> scratch(threads, 2 * pairs.tile_rows * pairs.tile_rows * pairs.n_segments);
  PerThread<double> norms(copies, n * n);
  std::vector<std::vector<char>> x_rows(static_cast<size_t>(copies),
                                        std::vector<char>(x.data ? static_cast<size_t>(D * 8) : 0));

  auto example = [&](int64_t b, int thread, int inner_threads) {
    double* norms_b = norms.of(thread);
    std::vector<char>& x_row = x_rows[thread];
    if (x.data) pairs.upcast_x(b, x_row);
    parallel_for(inner_threads, n_pairs, 1, [&](int64_t t, int inner) {
      pairs.run_tile(b, tile_pairs[t].first, tile_pairs[t].second, x.data ? x_row.data() : nullptr,
                     scratch.of(thread + inner), norms_b);
    });
    parallel_for(inner_threads, n, 16, [&](int64_t i, int) { pairs.finish_row(b, i, norms_b); });
  };
  if (by_example) {
    parallel_for(threads, B, 1 + B / (64 * threads), [&](int64_t b, int thread) { example(b, thread, 1); });
  } else {
    for (int64_t b = 0; b < B; ++b) example(b, 0, threads);
  }
}

}  // namespace fastsal
