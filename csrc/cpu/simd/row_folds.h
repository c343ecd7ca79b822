// Row folds: one segment of anchor - row for a group of rows, which share the loads of the anchor. Rows below float64
// are folded in float, and flushed to double before rounding errors add up. With x it also forms <x, anchor - row>,
// which pairwise_margins asks for.
#pragma once

#include "lanes.h"

// One segment again, for a pair that left the range of the fast path: in double for narrower rows, with an exponent
// for float64.
template <int Q, class T>
__attribute__((noinline)) static Scaled fold_again(const T* a, const T* r, int64_t len) {
  VecD sum = {};
  int64_t k = 0;
  for (; k + kDoubles <= len; k += kDoubles) sum = fold<Q>(sum, load_doubles(a + k) - load_doubles(r + k));
  if (k < len) {
    const Padded<T, kDoubles> ta(a + k, len - k), tr(r + k, len - k);
    sum = fold<Q>(sum, load_doubles(ta.value) - load_doubles(tr.value));
  }
  return {reduce<Q>(sum), 0};
}
template <int Q>
__attribute__((noinline)) static Scaled fold_again(const double* a, const double* r, int64_t len) {
  return scaled_fold<Q>([=](int64_t k) { return a[k] - r[k]; }, len);
}

template <class T, class X>
__attribute__((noinline)) static Scaled dot_again(const T* a, const T* r, const X* x, int64_t len) {
  return scaled_dot([=](int64_t k) { return static_cast<double>(x[k]); },
                    [=](int64_t k) { return as_double(a[k]) - as_double(r[k]); }, len);
}

// How many entries may be added to a float, by each of two accumulators, before it is flushed to double.
constexpr int kFloatAdditions = 32;
// How many rows a group has: as many as the registers hold.
constexpr int kGroupRows = kBytes == 64 ? 10 : 4;

// A anchors by R rows.
template <int A, int R>
struct GroupSums {
  VecD norm[A][R], dot[A][R];
};

template <int Q, class T, int A, int R, bool X>
__attribute__((always_inline)) static inline GroupSums<A, R> group_sums(const T* const* anchors, const T* const* rows,
                                                                        const typename OwnLanes<T>::Scalar* x,
                                                                        int64_t len, Ahead ahead) {
  typedef OwnLanes<T> L;
  typedef typename L::Vec Vec;
  GroupSums<A, R> sums;
  Vec n_acc[2][A * R], d_acc[2][A * R];
  auto clear = [&]() __attribute__((always_inline)) {
    each<A * R>([&](auto p) __attribute__((always_inline)) {
      n_acc[0][p] = n_acc[1][p] = Vec{};
      if constexpr (X) d_acc[0][p] = d_acc[1][p] = Vec{};
    });
  };
  each<A * R>([&](auto p) __attribute__((always_inline)) {
    sums.norm[p / R][p % R] = VecD{};
    if constexpr (X) sums.dot[p / R][p % R] = VecD{};
  });
  clear();
  auto step = [&](auto h, int64_t k, auto load) __attribute__((always_inline)) {
    typedef decltype(load(x)) Vecs;
    constexpr int H = sizeof(Vecs) / sizeof(Vec);
    Vecs a[A], xv = {};
    each<A>([&](auto i) __attribute__((always_inline)) { a[i] = load(anchors[i]); });
    if constexpr (X) xv = load(x);
    each<R>([&](auto r) __attribute__((always_inline)) {
      const Vecs v = load(rows[r]);
      each<A>([&](auto i) __attribute__((always_inline)) {
        each<H>([&](auto u) __attribute__((always_inline)) {
          const Vec d = a[i].of[u] - v.of[u];
          n_acc[h + u][i * R + r] = fold<Q>(n_acc[h + u][i * R + r], d);
          if constexpr (X) d_acc[h + u][i * R + r] = multiply_add(xv.of[u], d, d_acc[h + u][i * R + r]);
        });
      });
    });
    // After the loads: before them they hold those up, which takes 1.03 of the time.
    if (ahead.bytes == 0) return;
    const bool in_sequence = ahead.order == Order::kInSequence;
    int64_t at = ahead.bytes + k * static_cast<int64_t>(sizeof(T)) * (in_sequence ? R : 1);
    __asm__("" : "+r"(at));  // GCC would compute the address of every line before it knows the order, and spill them
    if (in_sequence) {
      prefetch<L, H * R, kFirstLevel>(rows[0], at);
    } else if (ahead.order == Order::kAlong) {
      for (int i = 0; i < A; ++i) prefetch<L, H, kFirstLevel>(anchors[i], at);
      for (int r = 0; r < R; ++r) prefetch<L, H, kFirstLevel>(rows[r], at);
    } else {
      for (int i = 0; i < A; ++i) prefetch<L, H>(anchors[i], at);
      for (int r = 0; r < R; ++r) prefetch<L, H>(rows[r], at);
    }
  };
  auto flush_all = [&]() __attribute__((always_inline)) {
    each<A * R>([&](auto p) __attribute__((always_inline)) {
      sums.norm[p / R][p % R] = flush<Q>(sums.norm[p / R][p % R], n_acc[0][p], n_acc[1][p]);
      if constexpr (X) sums.dot[p / R][p % R] = flush<kL1>(sums.dot[p / R][p % R], d_acc[0][p], d_acc[1][p]);
    });
    clear();
  };
  in_runs<L, kFloatAdditions>(len, step, flush_all);
  return sums;
}

// The folds that `count` vectors make, four reduced together; again(r) makes one that left the range of its lanes.
template <int Q, class Again>
__attribute__((always_inline)) static inline void finish(const VecD* sums, int count, int64_t len, double tiny,
                                                         Again again, Scaled* out, int64_t stride) {
  for (int r = 0; r < count; r += 4) {
    auto sum = [=](int k) { return sums[r + k < count ? r + k : count - 1]; };
    double folds[4];
    reduce_four<Q>(sum(0), sum(1), sum(2), sum(3), folds);
    for (int k = 0; k < 4 && r + k < count; ++k) out[(r + k) * stride] = {folds[k], 0};
    if (all_in_range(folds, len, tiny)) continue;
    for (int k = r; k < r + 4 && k < count; ++k) {
      if (!in_range(out[k * stride].value, len, tiny)) out[k * stride] = again(k);
    }
  }
}

// Not inline, these two would be a third of the machine code, once for each size of a group.
template <int Q, class T>
__attribute__((noinline)) static void finish_folds(const VecD* sums, int count, const T* anchor, const T* const* rows,
                                                   int64_t len, Scaled* out, int64_t stride) {
  auto again = [=](int r) { return fold_again<Q>(anchor, rows[r], len); };
  finish<Q>(sums, count, len, OwnLanes<T>::kTiny, again, out, stride);
}
template <class T, class X>
__attribute__((noinline)) static void finish_dots(const VecD* sums, int count, const T* anchor, const T* const* rows,
                                                  const X* x, int64_t len, Scaled* out, int64_t stride) {
  auto again = [=](int r) { return dot_again(anchor, rows[r], x, len); };
  finish<kL1>(sums, count, len, OwnLanes<T>::kTiny, again, out, stride);
}

template <int Q, class T, int A, int R, bool X>
static void fold_group(const T* const* anchors, const T* const* rows, int n_rows, const typename OwnLanes<T>::Scalar* x,
                       int64_t len, Ahead ahead, Scaled* norm, Scaled* dot, Strides out) {
  const GroupSums<A, R> sums = group_sums<Q, T, A, R, X>(anchors, rows, x, len, ahead);
  for (int i = 0; i < A; ++i) {
    finish_folds<Q>(sums.norm[i], n_rows, anchors[i], rows, len, norm + i * out.anchor, out.row);
    if constexpr (X) finish_dots(sums.dot[i], n_rows, anchors[i], rows, x, len, dot + i * out.anchor, out.row);
  }
}

// The template of as many rows as a call has, R at the most.
template <int Q, class T, int R>
static void fold_at_most(const T* const* anchors, const T* const* rows, int n_rows, int64_t len, Ahead ahead,
                         Scaled* norm, Strides out) {
  if (n_rows == R) return fold_group<Q, T, 1, R, false>(anchors, rows, R, nullptr, len, ahead, norm, nullptr, out);
  if constexpr (R > 1) fold_at_most<Q, T, R - 1>(anchors, rows, n_rows, len, ahead, norm, out);
}

// Row after row. The sums are reduced last: done in between, that would hold up the reading.
template <int Q, class T>
static void fold_in_one_stream(const T* anchor, const T* const* rows, int n_rows, int64_t len, Ahead ahead,
                               Scaled* norm, Strides out) {
  VecD sums[kMaxRows];
  for (int r = 0; r < n_rows; ++r) {
    sums[r] = group_sums<Q, T, 1, 1, false>(&anchor, rows + r, nullptr, len, ahead).norm[0][0];
  }
  finish_folds<Q>(sums, n_rows, anchor, rows, len, norm, out.row);
}

template <int Q, class T>
static void fold_rows(const void* const* anchors, int n_anchors, const void* const* rows, int n_rows, bool one_stream,
                      const void* x, int64_t len, Ahead ahead, Scaled* norm, Scaled* dot, Strides out) {
  const T* a[kMaxAnchors];
  const T* r[kMaxRows];
  for (int i = 0; i < n_anchors; ++i) a[i] = static_cast<const T*>(anchors[i]);
  for (int i = 0; i < n_rows; ++i) r[i] = static_cast<const T*>(rows[i]);
  const auto* xs = static_cast<const typename OwnLanes<T>::Scalar*>(x);
  if (one_stream) return fold_in_one_stream<Q, T>(a[0], r, n_rows, len, ahead, norm, out);
  if constexpr (kBytes == 64) {
    if (!x && n_anchors == 2 && n_rows == 4) {
      return fold_group<Q, T, 2, 4, false>(a, r, n_rows, xs, len, ahead, norm, dot, out);
    }
  }
  if (x && n_rows == 3) r[3] = r[2];  // three rows are four with one twice: less machine code
  for (int i = 0; i < n_anchors; ++i) {
    Scaled* own = norm + i * out.anchor;
    if (!x) {
      fold_at_most<Q, T, kGroupRows>(a + i, r, n_rows, len, ahead, own, out);
    } else {
      const auto fold_with_x = n_rows == 1   ? fold_group<Q, T, 1, 1, true>
                               : n_rows == 2 ? fold_group<Q, T, 1, 2, true>
                                             : fold_group<Q, T, 1, kPairRows, true>;
      fold_with_x(a + i, r, n_rows, xs, len, ahead, own, dot + i * out.anchor, out);
    }
  }
}
