// Row folds: one segment of anchor - row for a group of rows, which share the loads of the anchor. Rows below float64
// are folded in float, and flushed to double before rounding errors add up. With x it also forms <x, anchor - row>,
// which pairwise_margins asks for.
#pragma once

#include "folds.h"
#include "scaled_folds.h"

// The type that the differences of rows of T are formed in, and how a vector of them is loaded.
template <class T>
struct Compute {
  typedef float Scalar;
  typedef VecF Vec;
  static constexpr int kWidth = kFloats;
  static constexpr double kTiny = kTinyFloat;
  static inline Vec load(const T* p) { return load_floats<kFloats>(p); }
  // One of the two vectors that 2 * kWidth elements make, of a row or of x. Two bfloat16 neighbours share a word: one
  // load and two operations give the elements 0, 2, 4, ... and 1, 3, 5, ...
  static inline Vec load_of_two(int which, const T* p) {
    if constexpr (__is_same(T, BFloat16)) {
      const auto words = load_vector<typename VectorsOf<kFloats>::U>(p);
      return (Vec)(which == 0 ? words << 16 : words & 0xffff0000u);
    } else {
      return load(p + which * kWidth);
    }
  }
  static inline Vec load_x_of_two(int which, const float* x) {
    const Vec low = load_vector<Vec>(x), high = load_vector<Vec>(x + kWidth);
    if constexpr (__is_same(T, BFloat16)) return which == 0 ? every_second<0>(low, high) : every_second<1>(low, high);
    return which == 0 ? low : high;
  }
};
template <>
struct Compute<double> {
  typedef double Scalar;
  typedef VecD Vec;
  static constexpr int kWidth = kDoubles;
  static constexpr double kTiny = kTinyDouble;
  static inline Vec load(const double* p) { return load_vector<VecD>(p); }
  static inline Vec load_of_two(int which, const double* p) { return load(p + which * kWidth); }
  static inline Vec load_x_of_two(int which, const double* x) { return load(x + which * kWidth); }
};

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

// How many entries are added to a float before it is flushed to double, by each of two accumulators. One more may
// follow at the end of a segment, so 32 is the most.
constexpr int kFloatAdditions = 31;
// How many rows a group has: as many as the registers hold.
constexpr int kGroupRows = kBytes == 64 ? 10 : 4;

// A anchors by R rows.
template <int A, int R>
struct GroupSums {
  VecD norm[A][R], dot[A][R];
};

template <int Q, class T, int A, int R, bool X>
__attribute__((always_inline)) static inline GroupSums<A, R> group_sums(const T* const* anchors, const T* const* rows,
                                                                        const typename Compute<T>::Scalar* x,
                                                                        int64_t len, const char* const* ahead) {
  typedef Compute<T> C;
  typedef typename C::Vec Vec;
  typedef typename C::Scalar Scalar;
  constexpr int W = C::kWidth;
  constexpr int kPrefetchEvery = 64 / (W * sizeof(T)) > 1 ? 64 / (W * sizeof(T)) : 1;  // vectors in a cache line
  GroupSums<A, R> sums;
  for (int i = 0; i < A; ++i)
    for (int r = 0; r < R; ++r) sums.norm[i][r] = sums.dot[i][r] = VecD{};

  Vec n_acc[2][A][R], d_acc[2][A][R];
  auto clear = [&] {
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < A; ++i)
        for (int r = 0; r < R; ++r) n_acc[h][i][r] = d_acc[h][i][r] = Vec{};
  };
  auto step = [&](int h, auto load, auto load_x) __attribute__((always_inline)) {
    Vec a[A], v[R], xv = {};
    for (int i = 0; i < A; ++i) a[i] = load(anchors[i]);
    for (int r = 0; r < R; ++r) v[r] = load(rows[r]);
    if constexpr (X) xv = load_x(x);
    for (int i = 0; i < A; ++i) {
      for (int r = 0; r < R; ++r) {
        const Vec d = a[i] - v[r];
        n_acc[h][i][r] = fold<Q>(n_acc[h][i][r], d);
        if constexpr (X) d_acc[h][i][r] = multiply_add(xv, d, d_acc[h][i][r]);
      }
    }
  };
  // Into the second level cache: a prefetch into the first would compete with the loads for fill buffers.
  // The function is always inline, since GCC takes one that only prefetches for pure and drops calls of it.
  auto prefetch = [&](int64_t k) __attribute__((always_inline)) {
    for (int r = 0; ahead && r < R; ++r) {
      for (int b = 0; b < 2; b += kPrefetchEvery) __builtin_prefetch(ahead[r] + (k + b * W) * sizeof(T), 0, 2);
    }
  };
  auto flush_all = [&] {
    for (int i = 0; i < A; ++i) {
      for (int r = 0; r < R; ++r) {
        sums.norm[i][r] = flush<Q>(sums.norm[i][r], n_acc[0][i][r], n_acc[1][i][r]);
        if constexpr (X) sums.dot[i][r] = flush<kL1>(sums.dot[i][r], d_acc[0][i][r], d_acc[1][i][r]);
      }
    }
  };

  const int64_t whole = len / (2 * W) * (2 * W);
  for (int64_t k = 0; k < len;) {
    const int64_t end = k + 2 * W * kFloatAdditions < whole ? k + 2 * W * kFloatAdditions : whole;
    clear();
    for (; k < end; k += 2 * W) {
      prefetch(k);
      for (int h = 0; h < 2; ++h) {
        step(
            h, [=](const T* p) { return C::load_of_two(h, p + k); },
            [=](const Scalar* p) { return C::load_x_of_two(h, p + k); });
      }
    }
    if (k == whole && k < len) {  // one addition more
      prefetch(k);
      if (k + W <= len) {
        step(0, [=](const T* p) { return C::load(p + k); }, [=](const Scalar* p) { return load_vector<Vec>(p + k); });
        k += W;
      }
      if (k < len) {
        step(
            1, [=](const T* p) { return C::load(Padded<T, W>(p + k, len - k).value); },
            [=](const Scalar* p) { return load_vector<Vec>(Padded<Scalar, W>(p + k, len - k).value); });
        k = len;
      }
    }
    flush_all();
  }
  return sums;
}

template <int Q, class T>
static inline Scaled finished_fold(VecD sum, const T* anchor, const T* row, int64_t len) {
  const double n = reduce<Q>(sum);
  return in_range(n, len, Compute<T>::kTiny) ? Scaled{n, 0} : fold_again<Q>(anchor, row, len);
}

template <int Q, class T, int A, int R, bool X>
static void fold_group(const T* const* anchors, const T* const* rows, const typename Compute<T>::Scalar* x, int64_t len,
                       const char* const* ahead, Scaled* norm, Scaled* dot, Strides out) {
  const GroupSums<A, R> sums = group_sums<Q, T, A, R, X>(anchors, rows, x, len, ahead);
  for (int i = 0; i < A; ++i) {
    for (int r = 0; r < R; ++r) {
      const int64_t at = i * out.anchor + r * out.row;
      norm[at] = finished_fold<Q>(sums.norm[i][r], anchors[i], rows[r], len);
      if constexpr (X) {
        const double p = reduce<kL1>(sums.dot[i][r]);
        dot[at] = in_range(p, len, Compute<T>::kTiny) ? Scaled{p, 0} : dot_again(anchors[i], rows[r], x, len);
      }
    }
  }
}

// The template of as many rows as a call has, R at the most.
template <int Q, class T, int A, int R, bool X>
static void fold_at_most(const T* const* anchors, const T* const* rows, int n_rows,
                         const typename Compute<T>::Scalar* x, int64_t len, const char* const* ahead, Scaled* norm,
                         Scaled* dot, Strides out) {
  if (n_rows == R) return fold_group<Q, T, A, R, X>(anchors, rows, x, len, ahead, norm, dot, out);
  if constexpr (R > 1) fold_at_most<Q, T, A, R - 1, X>(anchors, rows, n_rows, x, len, ahead, norm, dot, out);
}

// Row after row. The sums are reduced last: done in between, that would hold up the reading.
template <int Q, class T>
static void fold_in_one_stream(const T* anchor, const T* const* rows, int n_rows, int64_t len, const char* const* ahead,
                               Scaled* norm, Strides out) {
  VecD sums[kMaxRows];
  auto sum = [=](const T* row, const char* const* next) __attribute__((always_inline)) {
    return group_sums<Q, T, 1, 1, false>(&anchor, &row, nullptr, len, next).norm[0][0];
  };
  for (int r = 0; r < n_rows; ++r) sums[r] = ahead ? sum(rows[r], ahead + r) : sum(rows[r], nullptr);
  for (int r = 0; r < n_rows; ++r) norm[r * out.row] = finished_fold<Q>(sums[r], anchor, rows[r], len);
}

template <int Q, class T>
static void fold_rows(const void* const* anchors, int n_anchors, const void* const* rows, int n_rows, bool one_stream,
                      const void* x, int64_t len, const void* const* ahead, Scaled* norm, Scaled* dot, Strides out) {
  const T* a[kMaxAnchors];
  const T* r[kMaxRows];
  const char* next[kMaxRows];
  for (int i = 0; i < n_anchors; ++i) a[i] = static_cast<const T*>(anchors[i]);
  for (int i = 0; i < n_rows; ++i) r[i] = static_cast<const T*>(rows[i]);
  if (ahead) {
    for (int i = 0; i < n_rows; ++i) next[i] = static_cast<const char*>(ahead[i]);
  }
  const auto* xs = static_cast<const typename Compute<T>::Scalar*>(x);
  const char* const* hint = ahead ? next : nullptr;
  if (one_stream) return fold_in_one_stream<Q, T>(a[0], r, n_rows, len, hint, norm, out);
  if constexpr (kBytes == 64) {
    if (!x && n_anchors == 2 && n_rows == 4) {
      return fold_group<Q, T, 2, 4, false>(a, r, xs, len, hint, norm, dot, out);
    }
  }
  for (int i = 0; i < n_anchors; ++i) {
    Scaled* own = norm + i * out.anchor;
    if (x) {
      fold_at_most<Q, T, 1, kPairRows, true>(a + i, r, n_rows, xs, len, hint, own, dot + i * out.anchor, out);
    } else {
      fold_at_most<Q, T, 1, kGroupRows, false>(a + i, r, n_rows, xs, len, hint, own, nullptr, out);
    }
  }
}
