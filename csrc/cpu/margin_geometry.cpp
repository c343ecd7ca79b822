// margin_geometry: of every example the row norms, the runner-up and the winner sums, by example where there are enough
// of them, else each step of all examples in parallel.
#include <vector>

#include "fastsal/nearest.h"
#include "fastsal/scalars.h"
#include "parallel.h"
#include "row_norms.h"

namespace fastsal {
namespace {

struct Winners {
  int64_t prediction;
  Candidate runner_up;
};

// What one thread works with for one example: [n, segments], [n], [segments] and [segments].
struct Scratch {
  Scaled* folds;
  double* ratios;
  TwoRowSums* two_rows;
  Scaled* gaps;
};

// The index that comes first by is_before among n >= 1 values, the lowest among equals. Where the least is infinite,
// `sooner(j, i)` says whether j > i comes before i. Finite values are searched without a branch that depends on them.
template <class Sooner>
inline int64_t first_of_all(int64_t n, const double* values, const Sooner& sooner) {
  double least = values[0];
  int64_t best = 0;
  bool ordered = least == least;
  for (int64_t j = 1; j < n; ++j) {
    const bool less = values[j] < least;
    ordered = ordered & (values[j] == values[j]);
    best ^= (best ^ j) & -static_cast<int64_t>(less);
    least = less ? values[j] : least;
  }
  if (ordered && least < INFINITY) return best;
  best = 0;
  for (int64_t j = 1; j < n; ++j) {
    const double v = values[j], now = values[best];
    if (is_before(v, now) || (v == INFINITY && now == INFINITY && sooner(j, best))) best = j;
  }
  return best;
}

class Example {
 public:
  Example(int q, const Logits& logits, const Rows& jacobian, const Inputs& x, Output scalars, int64_t* indices,
          Output distances)
      : q_(q),
        logits_(logits),
        jacobian_(jacobian),
        x_(x),
        scalars_(scalars),
        indices_(indices),
        distances_(distances),
        row_norms_(q, jacobian),
        n_segments_(row_norms_.segment_count()),
        winner_sums_(kernels().winner_sums[q][jacobian.dtype][x.dtype == kFloat32]),
        gap_(kernels().gap[q][jacobian.dtype]) {}

  const RowNorms& row_norms() const { return row_norms_; }

  // The predicted class. negated: [n], becomes minus the logits.
  int64_t prediction(int64_t b, double* negated) const {
    const int64_t n = jacobian_.n;
    for (int64_t j = 0; j < n; ++j) negated[j] = -logit(b, j);
    return first_of_all(n, negated, [](int64_t, int64_t) { return false; });
  }

  // Joins the rows' folds [n, segments] into the distances and the runner-up. ratios: [n], minus the logits, becomes
  // the distances. The prediction's fold is lost.
  Winners select(int64_t b, int64_t prediction, Scaled* folds, double* ratios) const {
    const int64_t n = jacobian_.n;
    auto margin = [=](int64_t j) { return logit(b, prediction) - logit(b, j); };
    folds[prediction * n_segments_] = {1, 0};
    if (!plain_ratios(ratios[prediction], folds, ratios)) {
      for (int64_t j = 0; j < n; ++j) {
        ratios[j] = ratio(margin(j), to_double(norm_segments(q_, folds + j * n_segments_, n_segments_)));
      }
    }
    ratios[prediction] = INFINITY;
    for (int64_t j = 0; j < n; ++j) distances_.set(b * n + j, ratios[j]);
    // Where all ratios are infinite, by margin; the prediction never.
    const int64_t best = first_of_all(n, ratios, [=](int64_t j, int64_t than) {
      return than == prediction || (j != prediction && margin(j) < margin(than));
    });
    indices_[b] = prediction;
    indices_[jacobian_.B + b] = best;
    return {prediction, {ratios[best], margin(best), best}};
  }

  void sums(int64_t b, int64_t segment, const Winners& rows, const Soon& soon, TwoRowSums* out) const {
    const int64_t at = segment * kSegment;
    winner_sums_(row(b, rows.prediction, at), row(b, rows.runner_up.index, at), x_.row(b) + at * kElementSize[x_.dtype],
                 segment_length(at, jacobian_.D), soon, out);
  }

  // The norms and dot products over all of D from their segments.
  TwoRowSums combine(const TwoRowSums* partial, Scaled* scratch) const {
    auto gather = [&](Scaled TwoRowSums::* field) {
      for (int64_t s = 0; s < n_segments_; ++s) scratch[s] = partial[s].*field;
      return scratch;
    };
    const int p = dual_norm(q_);
    return {sum_segments(gather(&TwoRowSums::dot_g), n_segments_),
            sum_segments(gather(&TwoRowSums::dot_d), n_segments_),
            norm_segments(q_, gather(&TwoRowSums::norm_g), n_segments_),
            norm_segments(q_, gather(&TwoRowSums::norm_d), n_segments_),
            norm_segments(p, gather(&TwoRowSums::norm_x), n_segments_),
            sum_segments(gather(&TwoRowSums::cross), n_segments_)};
  }

  // Whether the direction gap needs its pass over the rows: finish() can do without for q = 2 below float64, where the
  // gap is not small. By winner_sums.h <g,d> is off by 5 u of |g| |d|, and each of the norms by 2.5 u. That makes 20 u
  // of the squared gap, 10 u / gap = 8.4e-7 of a gap of 0.71, and with what d and the result are rounded by 9.7e-7.
  bool needs_gap(const TwoRowSums& sums) const {
    constexpr double kSmall = 0.5;
    return q_ != kL2 || jacobian_.dtype == kFloat64 || !(squared_gap(sums) > kSmall);
  }

  Scaled gap(int64_t b, int64_t segment, const Winners& rows, const TwoRowSums& sums) const {
    const int64_t at = segment * kSegment;
    return {gap_(row(b, rows.prediction, at), row(b, rows.runner_up.index, at), segment_length(at, jacobian_.D),
                 unit_of(sums.norm_d), unit_of(sums.norm_g)),
            0};
  }

  void finish(int64_t b, const Winners& rows, const TwoRowSums& sums, const Scaled* gaps) const {
    const double gap = needs_gap(sums) ? to_double(norm_segments(q_, gaps, n_segments_)) : sqrt(squared_gap(sums));
    double all[kScalars];
    two_row_scalars(logit(b, rows.prediction), rows.runner_up.margin, rows.runner_up.ratio, sums, gap, all);
    for (int s = 0; s < kScalars; ++s) scalars_.set(s * jacobian_.B + b, all[s]);
  }

  // Everything for one example, while its rows are in cache.
  void run(int64_t b, const Scratch& own) const {
    const int64_t top = prediction(b, own.ratios);
    const Soon next = soon(b);
    row_norms_.run_all(b, row(b, top, 0), top, own.folds);
    const Winners rows = select(b, top, own.folds, own.ratios);
    for (int64_t s = 0; s < n_segments_; ++s) sums(b, s, rows, next, own.two_rows + s);
    const TwoRowSums total = combine(own.two_rows, own.gaps);
    for (int64_t s = 0; s < n_segments_ && needs_gap(total); ++s) own.gaps[s] = gap(b, s, rows, total);
    finish(b, rows, total, own.gaps);
  }

  const char* row(int64_t b, int64_t j, int64_t at) const {
    return jacobian_.row(b, j) + at * kElementSize[jacobian_.dtype];
  }

 private:
  double logit(int64_t b, int64_t j) const { return logits_.at(b * jacobian_.n + j); }

  // The ratios of rows of one segment and ordinary size, in loops of one operation each, which the compiler makes
  // vectors of. False where the general rules have to decide: ratios are then anything.
  bool plain_ratios(double negated_top, const Scaled* folds, double* ratios) const {
    if (n_segments_ != 1 || q_ != kL2) return false;
    int64_t exponents = 0;
    for (int64_t j = 0; j < jacobian_.n; ++j) exponents |= folds[j].exponent;
    if (exponents != 0) return false;
    for (int64_t j = 0; j < jacobian_.n; ++j) ratios[j] = (ratios[j] - negated_top) / sqrt(folds[j].value);
    bool ordered = true;
    for (int64_t j = 0; j < jacobian_.n; ++j) ordered = ordered & (ratios[j] == ratios[j]);
    return ordered;
  }

  // What the winner sums prefetch of the next example: a short x would be asked for too late by its own.
  Soon soon(int64_t b) const {
    constexpr int64_t kShort = 16384;  // bytes
    const bool is_short = b + 1 < jacobian_.B && jacobian_.D * kElementSize[x_.dtype] <= kShort;
    return {is_short ? x_.row(b + 1) : nullptr, row_norms_.left_for_later(b)};
  }

  int q_;
  const Logits& logits_;
  const Rows& jacobian_;
  const Inputs& x_;
  Output scalars_;
  int64_t* indices_;
  Output distances_;
  RowNorms row_norms_;
  int64_t n_segments_;
  WinnerSumsFn winner_sums_;
  GapFn gap_;
};

}  // namespace

void margin_geometry(int q, const Logits& logits, const Rows& jacobian, const Inputs& x, Output scalars,
                     int64_t* indices, Output distances, int threads) {
  const Example example(q, logits, jacobian, x, scalars, indices, distances);
  const RowNorms& row_norms = example.row_norms();
  const int64_t B = jacobian.B, n = jacobian.n, n_segments = row_norms.segment_count(),
                n_groups = row_norms.group_count();
  threads = useful_threads(threads, B * n_groups * n_segments, B * n * jacobian.D);

  if (threads == 1 || B >= 32 * threads) {
    PerThread<Scaled> folds(threads, n * n_segments), gaps(threads, n_segments);
    PerThread<double> ratios(threads, n);
    PerThread<TwoRowSums> two_rows(threads, n_segments);
    const int64_t grain = 1 + B / (64 * threads);
    parallel_for(threads, B, grain,
                 [&](int64_t b, int t) { example.run(b, {folds.of(t), ratios.of(t), two_rows.of(t), gaps.of(t)}); });
    return;
  }

  std::vector<int64_t> predictions(static_cast<size_t>(B));
  std::vector<double> ratios(static_cast<size_t>(B * n));
  for (int64_t b = 0; b < B; ++b) predictions[b] = example.prediction(b, &ratios[b * n]);
  std::vector<Scaled> partial(static_cast<size_t>(B * n * n_segments));
  parallel_for(threads, B * n_groups, 1, [&](int64_t unit, int) {
    const int64_t b = unit / n_groups, top = predictions[b];
    for (int64_t s = 0; s < n_segments; ++s) {
      row_norms.run(b, unit % n_groups, s, example.row(b, top, 0), top, partial.data() + b * n * n_segments);
    }
  });
  std::vector<Winners> winners(static_cast<size_t>(B));
  for (int64_t b = 0; b < B; ++b) {
    winners[b] = example.select(b, predictions[b], &partial[b * n * n_segments], &ratios[b * n]);
  }
  std::vector<TwoRowSums> two_rows(static_cast<size_t>(B * n_segments)), total(static_cast<size_t>(B));
  std::vector<Scaled> gaps(static_cast<size_t>(B * n_segments));
  parallel_for(threads, B * n_segments, 1, [&](int64_t unit, int) {
    example.sums(unit / n_segments, unit % n_segments, winners[unit / n_segments], {}, &two_rows[unit]);
  });
  for (int64_t b = 0; b < B; ++b) total[b] = example.combine(&two_rows[b * n_segments], &gaps[b * n_segments]);
  parallel_for(threads, B * n_segments, 1, [&](int64_t unit, int) {
    const int64_t b = unit / n_segments;
    if (example.needs_gap(total[b])) gaps[unit] = example.gap(b, unit % n_segments, winners[b], total[b]);
  });
  for (int64_t b = 0; b < B; ++b) example.finish(b, winners[b], total[b], &gaps[b * n_segments]);
}

}  // namespace fastsal
