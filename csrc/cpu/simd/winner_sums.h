// Winner sums: one segment of all sums over the two winning rows and x. For q = 2 below float64 the lanes are floats,
// else doubles; either way they are flushed to double before constant rows drift. Sums that leave the range of their
// lanes are made again: those of floats in double, those of float64 with an exponent.
#pragma once

#include "lanes.h"

// How many entries are added to a lane before it is flushed. With u = 2^-24, a float sum that every term enters with at
// most N roundings, and one more where the two accumulators are joined, is off by (N + 1) u of the sum of its terms'
// magnitudes. The worst of the contract's quantities take two such sums: alpha-dagger <x,d> and half the error of
// |d|^2, 1.5 (N + 1) u, with d itself rounded, 2 u, and the result, u. 10.5 u = 6.3e-7 at N = 4.
// The direction gap has a rule of its own, in margin_geometry.cpp.
constexpr int kWinnerAdditions = 4, kDoubleAdditions = 32;

template <int Q, class T, class X, class Scalar>
__attribute__((always_inline)) static inline bool winner_sums_in(const T* g, const T* row, const X* x, int64_t len,
                                                                 const Soon& soon, TwoRowSums* out) {
  constexpr int P = dual_norm(Q);  // the norm of x is the dual of the gradients'
  typedef Lanes<T, Scalar> L;
  typedef typename L::Vec Vec;
  constexpr bool kCross = Q == kL2 && sizeof(T) < 8;
  constexpr int kSums = kCross ? 6 : 5;
  VecD total[6] = {};
  Vec acc[2][kSums] = {};
  auto step = [&](auto h, int64_t at, auto load) __attribute__((always_inline)) {
    const auto gs = load(g), rows = load(row);
    const auto xs = load(x);
    constexpr int H = sizeof(gs) / sizeof(Vec);
    if (soon.x) prefetch<L, H>(static_cast<const X*>(soon.x) + at, 0);
    if (soon.row) prefetch<L, H>(static_cast<const T*>(soon.row) + at, 0);
    each<H>([&](auto u) __attribute__((always_inline)) {
      const Vec gv = gs.of[u], d = gv - rows.of[u], xv = xs.of[u];
      Vec* sums = acc[h + u];
      sums[0] = multiply_add(xv, gv, sums[0]);
      sums[1] = multiply_add(xv, d, sums[1]);
      sums[2] = fold<Q>(sums[2], gv);
      sums[3] = fold<Q>(sums[3], d);
      sums[4] = fold<P>(sums[4], xv);
      if constexpr (kCross) sums[5] = multiply_add(gv, d, sums[5]);
    });
  };
  auto flush_all = [&]() __attribute__((always_inline)) {
    total[0] = flush<kL1>(total[0], acc[0][0], acc[1][0]);
    total[1] = flush<kL1>(total[1], acc[0][1], acc[1][1]);
    total[2] = flush<Q>(total[2], acc[0][2], acc[1][2]);
    total[3] = flush<Q>(total[3], acc[0][3], acc[1][3]);
    total[4] = flush<P>(total[4], acc[0][4], acc[1][4]);
    if constexpr (kCross) total[5] = flush<kL1>(total[5], acc[0][5], acc[1][5]);
    each<kSums>([&](auto s) __attribute__((always_inline)) { acc[0][s] = acc[1][s] = Vec{}; });
  };
  in_runs<L, L::kFloat ? kWinnerAdditions : kDoubleAdditions>(len, step, flush_all);
  double dots[4], norms[4];
  reduce_four<kL1>(total[0], total[1], total[5], total[5], dots);
  *out = {{dots[0], 0}, {dots[1], 0}, {0, 0}, {0, 0}, {0, 0}, {dots[2], 0}};
  if constexpr (P == Q) {
    reduce_four<Q>(total[2], total[3], total[4], total[4], norms);
    out->norm_g.value = norms[0], out->norm_d.value = norms[1], out->norm_x.value = norms[2];
    return L::kFloat && all_in_range(dots, len, kTinyFloat) && all_in_range(norms, len, kTinyFloat);
  } else {
    reduce_four<Q>(total[2], total[3], total[3], total[3], norms);
    out->norm_g.value = norms[0], out->norm_d.value = norms[1], out->norm_x.value = reduce<P>(total[4]);
    return false;
  }
}

template <int Q, class T, class X>
static void winner_sums(const void* g_ptr, const void* row_ptr, const void* x_ptr, int64_t len, const Soon& soon,
                        TwoRowSums* out) {
  const T* g = static_cast<const T*>(g_ptr);
  const T* row = static_cast<const T*>(row_ptr);
  const X* x = static_cast<const X*>(x_ptr);
  if constexpr (Q == kL2 && sizeof(T) < 8) {
    if (winner_sums_in<Q, T, X, float>(g, row, x, len, soon, out)) return;
  }
  winner_sums_in<Q, T, X, double>(g, row, x, len, soon, out);
  if constexpr (sizeof(T) == 8) {
    auto get_x = [=](int64_t k) { return as_double(x[k]); };
    auto get_g = [=](int64_t k) { return as_double(g[k]); };
    auto get_d = [=](int64_t k) { return as_double(g[k]) - as_double(row[k]); };
    auto lost = [=](Scaled s) { return !in_range(s.value, len, kTinyDouble); };
    if (lost(out->dot_g)) out->dot_g = scaled_dot(get_x, get_g, len);
    if (lost(out->dot_d)) out->dot_d = scaled_dot(get_x, get_d, len);
    if (lost(out->norm_g)) out->norm_g = scaled_fold<Q>(get_g, len);
    if (lost(out->norm_d)) out->norm_d = scaled_fold<Q>(get_d, len);
    if (lost(out->norm_x)) out->norm_x = scaled_fold<dual_norm(Q)>(get_x, len);
  }
}

template <int Q, class T, bool Shifted>
static double gap_sum(const T* g, const T* row, int64_t len, Unit du, Unit gu) {
  typedef Lanes<T, double> L;
  VecD total = {}, acc[2] = {};
  auto step = [&](auto h, int64_t at, auto load) __attribute__((always_inline)) {
    const auto gs = load(g), rows = load(row);
    for (unsigned k = 0; k < sizeof(gs) / sizeof(VecD); ++k) {
      VecD gv = gs.of[k], d = gv - rows.of[k];
      if constexpr (Shifted) {
        d = d * du.power;
        gv = gv * gu.power;
      }
      acc[h + k] = fold<Q>(acc[h + k], d * du.inverse - gv * gu.inverse);
    }
  };
  auto flush_all = [&]() __attribute__((always_inline)) {
    total = flush<Q>(total, acc[0], acc[1]);
    acc[0] = acc[1] = VecD{};
  };
  in_runs<L, kDoubleAdditions>(len, step, flush_all);
  return reduce<Q>(total);
}

template <int Q, class T>
static double gap(const void* g_ptr, const void* row_ptr, int64_t len, Unit du, Unit gu) {
  const T* g = static_cast<const T*>(g_ptr);
  const T* row = static_cast<const T*>(row_ptr);
  if (du.power == 1 && gu.power == 1) return gap_sum<Q, T, false>(g, row, len, du, gu);
  return gap_sum<Q, T, true>(g, row, len, du, gu);
}
