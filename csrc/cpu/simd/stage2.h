// Stage 2: one segment of the sums over the two winning rows and x, in double lanes that are flushed every kBlock
// additions, so that constant rows do not drift.
#pragma once

#include "scaled_sums.h"
#include "sums.h"

constexpr int kBlock = 32;

template <int Q, class T, class X>
static void two_row(const void* g_ptr, const void* row_ptr, const void* x_ptr, int64_t len, const char* ahead,
                    TwoRowSums* out) {
  constexpr int P = Q == kL2 ? kL2 : Q == kL1 ? kMax : kL1;  // the norm of x is the dual of the gradients'
  constexpr bool kCross = Q == kL2 && sizeof(T) < 8;
  const T* g = static_cast<const T*>(g_ptr);
  const T* row = static_cast<const T*>(row_ptr);
  const X* x = static_cast<const X*>(x_ptr);
  VecD total[6] = {}, acc[6] = {};
  auto step = [&](VecD gv, VecD rv, VecD xv) {
    const VecD d = gv - rv;
    acc[0] = multiply_add(xv, gv, acc[0]);
    acc[1] = multiply_add(xv, d, acc[1]);
    acc[2] = accumulate<Q>(acc[2], gv);
    acc[3] = accumulate<Q>(acc[3], d);
    acc[4] = accumulate<P>(acc[4], xv);
    if constexpr (kCross) acc[5] = multiply_add(gv, d, acc[5]);
  };
  auto drain = [&] {
    total[0] = total[0] + acc[0];
    total[1] = total[1] + acc[1];
    total[2] = join<Q>(total[2], acc[2]);
    total[3] = join<Q>(total[3], acc[3]);
    total[4] = join<P>(total[4], acc[4]);
    if constexpr (kCross) total[5] = total[5] + acc[5];
    for (VecD& v : acc) v = VecD{};
  };
  constexpr int W = kHalfLanes;
  constexpr int64_t kAhead = W * sizeof(T) * kRowsAhead;
  const int64_t whole = len / W * W;
  for (int64_t k = 0; k < whole;) {
    const int64_t end = k + W * kBlock < whole ? k + W * kBlock : whole;
    for (; k < end; k += W) {
      if (ahead) {
        for (int64_t line = 0; line < kAhead; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        ahead += kAhead;
      }
      step(load_doubles(g + k), load_doubles(row + k), load_doubles(x + k));
    }
    drain();
  }
  if (whole < len) {
    const int64_t rest = len - whole;
    step(load_doubles(Padded<T, W>(g + whole, rest).value), load_doubles(Padded<T, W>(row + whole, rest).value),
         load_doubles(Padded<X, W>(x + whole, rest).value));
    drain();
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
    if (lost(out->norm_g)) out->norm_g = scaled_norm<Q>(get_g, len);
    if (lost(out->norm_d)) out->norm_d = scaled_norm<Q>(get_d, len);
    if (lost(out->norm_x)) out->norm_x = scaled_norm<P>(get_x, len);
  }
}

template <int Q, class T, bool Shifted>
static double gap_sum(const T* g, const T* row, int64_t len, Unit du, Unit gu) {
  constexpr int W = kHalfLanes;
  VecD total = {}, acc[2] = {};
  auto step = [&](int h, VecD gv, VecD rv) {
    VecD d = gv - rv;
    if constexpr (Shifted) {
      d = d * du.power;
      gv = gv * gu.power;
    }
    acc[h] = accumulate<Q>(acc[h], d * du.inverse - gv * gu.inverse);
  };
  auto drain = [&] {
    total = join<Q>(total, join<Q>(acc[0], acc[1]));
    acc[0] = acc[1] = VecD{};
  };
  const int64_t whole = len / (2 * W) * (2 * W);
  for (int64_t k = 0; k < whole;) {
    const int64_t end = k + 2 * W * kBlock < whole ? k + 2 * W * kBlock : whole;
    for (; k < end; k += 2 * W) {
      step(0, load_doubles(g + k), load_doubles(row + k));
      step(1, load_doubles(g + k + W), load_doubles(row + k + W));
    }
    drain();
  }
  for (int64_t k = whole; k < len; k += W) {
    const int64_t rest = len - k < W ? len - k : W;
    step(0, load_doubles(Padded<T, W>(g + k, rest).value), load_doubles(Padded<T, W>(row + k, rest).value));
  }
  drain();
  return reduce<Q>(total);
}

template <int Q, class T>
static double gap(const void* g_ptr, const void* row_ptr, int64_t len, Unit du, Unit gu) {
  const T* g = static_cast<const T*>(g_ptr);
  const T* row = static_cast<const T*>(row_ptr);
  if (du.power == 1 && gu.power == 1) return gap_sum<Q, T, false>(g, row, len, du, gu);
  return gap_sum<Q, T, true>(g, row, len, du, gu);
}
