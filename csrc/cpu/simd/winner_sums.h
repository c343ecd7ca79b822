// Winner sums: one segment of all sums over the two winning rows and x, in double, flushed every kDoubleAdditions
// entries, so that constant rows do not drift. float64 sums that leave the range of double are made again by the slow
// path.
#pragma once

#include "folds.h"
#include "scaled_folds.h"

constexpr int kDoubleAdditions = 32;

template <int Q, class T, class X>
static void winner_sums(const void* g_ptr, const void* row_ptr, const void* x_ptr, int64_t len, const char* ahead,
                        TwoRowSums* out) {
  constexpr int P = dual_norm(Q);  // the norm of x is the dual of the gradients'
  constexpr bool kCross = Q == kL2 && sizeof(T) < 8;
  const T* g = static_cast<const T*>(g_ptr);
  const T* row = static_cast<const T*>(row_ptr);
  const X* x = static_cast<const X*>(x_ptr);
  VecD total[6] = {}, acc[6] = {};
  auto step = [&](VecD gv, VecD rv, VecD xv) {
    const VecD d = gv - rv;
    acc[0] = multiply_add(xv, gv, acc[0]);
    acc[1] = multiply_add(xv, d, acc[1]);
    acc[2] = fold<Q>(acc[2], gv);
    acc[3] = fold<Q>(acc[3], d);
    acc[4] = fold<P>(acc[4], xv);
    if constexpr (kCross) acc[5] = multiply_add(gv, d, acc[5]);
  };
  auto flush_all = [&] {
    total[0] = total[0] + acc[0];
    total[1] = total[1] + acc[1];
    total[2] = join<Q>(total[2], acc[2]);
    total[3] = join<Q>(total[3], acc[3]);
    total[4] = join<P>(total[4], acc[4]);
    if constexpr (kCross) total[5] = total[5] + acc[5];
    for (VecD& v : acc) v = VecD{};
  };
  constexpr int W = kDoubles;
  constexpr int64_t kAhead = W * sizeof(T) * kRowsAhead;
  const int64_t whole = len / W * W;
  for (int64_t k = 0; k < whole;) {
    const int64_t end = k + W * kDoubleAdditions < whole ? k + W * kDoubleAdditions : whole;
    for (; k < end; k += W) {
      if (ahead) {
        for (int64_t line = 0; line < kAhead; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        ahead += kAhead;
      }
      step(load_doubles(g + k), load_doubles(row + k), load_doubles(x + k));
    }
    flush_all();
  }
  if (whole < len) {
    const int64_t rest = len - whole;
    step(load_doubles(Padded<T, W>(g + whole, rest).value), load_doubles(Padded<T, W>(row + whole, rest).value),
         load_doubles(Padded<X, W>(x + whole, rest).value));
    flush_all();
  }
  *out = {{reduce<kL1>(total[0]), 0}, {reduce<kL1>(total[1]), 0}, {reduce<Q>(total[2]), 0},
          {reduce<Q>(total[3]), 0},   {reduce<P>(total[4]), 0},   {reduce<kL1>(total[5]), 0}};
  if constexpr (sizeof(T) == 8) {
    auto get_x = [=](int64_t k) { return as_double(x[k]); };
    auto get_g = [=](int64_t k) { return as_double(g[k]); };
    auto get_d = [=](int64_t k) { return as_double(g[k]) - as_double(row[k]); };
    auto lost = [=](Scaled s) { return !in_range(s.value, len, kTinyDouble); };
    if (lost(out->dot_g)) out->dot_g = scaled_dot(get_x, get_g, len);
    if (lost(out->dot_d)) out->dot_d = scaled_dot(get_x, get_d, len);
    if (lost(out->norm_g)) out->norm_g = scaled_fold<Q>(get_g, len);
    if (lost(out->norm_d)) out->norm_d = scaled_fold<Q>(get_d, len);
    if (lost(out->norm_x)) out->norm_x = scaled_fold<P>(get_x, len);
  }
}

template <int Q, class T, bool Shifted>
static double gap_sum(const T* g, const T* row, int64_t len, Unit du, Unit gu) {
  constexpr int W = kDoubles;
  VecD total = {}, acc[2] = {};
  auto step = [&](int h, VecD gv, VecD rv) {
    VecD d = gv - rv;
    if constexpr (Shifted) {
      d = d * du.power;
      gv = gv * gu.power;
    }
    acc[h] = fold<Q>(acc[h], d * du.inverse - gv * gu.inverse);
  };
  auto flush_all = [&] {
    total = join<Q>(total, join<Q>(acc[0], acc[1]));
    acc[0] = acc[1] = VecD{};
  };
  const int64_t whole = len / (2 * W) * (2 * W);
  for (int64_t k = 0; k < whole;) {
    const int64_t end = k + 2 * W * kDoubleAdditions < whole ? k + 2 * W * kDoubleAdditions : whole;
    for (; k < end; k += 2 * W) {
      step(0, load_doubles(g + k), load_doubles(row + k));
      step(1, load_doubles(g + k + W), load_doubles(row + k + W));
    }
    flush_all();
  }
  for (int64_t k = whole; k < len; k += W) {
    const int64_t rest = len - k < W ? len - k : W;
    step(0, load_doubles(Padded<T, W>(g + k, rest).value), load_doubles(Padded<T, W>(row + k, rest).value));
  }
  flush_all();
  return reduce<Q>(total);
}

template <int Q, class T>
static double gap(const void* g_ptr, const void* row_ptr, int64_t len, Unit du, Unit gu) {
  const T* g = static_cast<const T*>(g_ptr);
  const T* row = static_cast<const T*>(row_ptr);
  if (du.power == 1 && gu.power == 1) return gap_sum<Q, T, false>(g, row, len, du, gu);
  return gap_sum<Q, T, true>(g, row, len, du, gu);
}
