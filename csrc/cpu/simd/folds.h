// Vectors of folds. The fold of entries is the q-norm before its root: the sum of their squares (q = 2), the sum of
// their magnitudes (q = 1), or the largest magnitude (q = infinity). Every fold of a segment is made of these
// operations alone.
#pragma once

#include "vectors.h"

// Integers as wide as the entries of V, as its comparisons give them.
template <class V>
using Bits = decltype(V{} < V{});

template <class V>
static inline V magnitude(V v) {
  return (V)((Bits<V>)v & ~(Bits<V>)(-V{}));
}

// As integers NaN > infinity > every number, so a maximum of magnitudes never loses a NaN.
template <class V>
static inline V larger(V a, V b) {
  return (V)((Bits<V>)a > (Bits<V>)b ? (Bits<V>)a : (Bits<V>)b);
}

// What an entry d contributes to a fold, and how two folds become one.
template <int Q, class V>
static inline V term(V d) {
  return Q == kL2 ? d * d : magnitude(d);
}
template <int Q, class V>
static inline V join(V sum, V t) {
  if constexpr (Q == kMax) return larger(sum, t);
  return sum + t;
}

// a * b + sum, rounded once where the level has the instruction. It is named here, since -ffp-contract=off keeps the
// compiler from choosing it for one group of rows and not for another.
static inline VecF multiply_add(VecF a, VecF b, VecF sum) {
#if defined(FASTSAL_FMA) && FASTSAL_BYTES == 64
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(FASTSAL_FMA)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}
static inline VecD multiply_add(VecD a, VecD b, VecD sum) {
#if defined(FASTSAL_FMA) && FASTSAL_BYTES == 64
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(FASTSAL_FMA)
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#else
  return sum + a * b;
#endif
}

// The fold with one more entry d.
template <int Q, class V>
static inline V fold(V sum, V d) {
  if constexpr (Q == kL2) return multiply_add(d, d, sum);
  return join<Q>(sum, term<Q>(d));
}

// Of each vector the two halves joined: from one of eight entries one of four, from two of four both results.
#if FASTSAL_BYTES > 16
typedef VectorsOf<4>::D Four;
template <int Q>
static inline Four halved(VecD v) {
#if FASTSAL_BYTES == 64
  return join<Q>(pick<0, 1, 2, 3>(v, v), pick<4, 5, 6, 7>(v, v));
#else
  return v;
#endif
}
template <int Q>
static inline Four both_halved(Four v, Four w) {
  return join<Q>(pick<0, 1, 4, 5>(v, w), pick<2, 3, 6, 7>(v, w));
}
#endif

// The entries of each of four vectors joined, every vector in the same fixed order: the first half with the second
// until one is left. The four are transposed meanwhile, so that none waits for additions of its own alone.
template <int Q>
static inline void reduce_four(VecD a, VecD b, VecD c, VecD d, double* out) {
#if FASTSAL_BYTES == 16
  const VecD ab = join<Q>(pick<0, 2>(a, b), pick<1, 3>(a, b)), cd = join<Q>(pick<0, 2>(c, d), pick<1, 3>(c, d));
  __builtin_memcpy(out, &ab, sizeof ab);
  __builtin_memcpy(out + 2, &cd, sizeof cd);
#else
  const Four ac = both_halved<Q>(halved<Q>(a), halved<Q>(c)), bd = both_halved<Q>(halved<Q>(b), halved<Q>(d));
  const Four all = join<Q>(pick<0, 4, 2, 6>(ac, bd), pick<1, 5, 3, 7>(ac, bd));
  __builtin_memcpy(out, &all, sizeof all);
#endif
}
template <int Q>
static inline double reduce(VecD v) {
  double all[4];
  reduce_four<Q>(v, v, v, v, all);
  return all[0];
}

// A fold in double, joined with the two accumulators a and b of a run of additions.
template <int Q>
static inline VecD flush(VecD sum, VecF a, VecF b) {
  const VecF both = join<Q>(a, b);
#if FASTSAL_BYTES == 64
  const auto low = pick<0, 1, 2, 3, 4, 5, 6, 7>(both, both), high = pick<8, 9, 10, 11, 12, 13, 14, 15>(both, both);
#elif FASTSAL_BYTES == 32
  const auto low = pick<0, 1, 2, 3>(both, both), high = pick<4, 5, 6, 7>(both, both);
#else
  const auto low = pick<0, 1>(both, both), high = pick<2, 3>(both, both);
#endif
  return join<Q>(sum, join<Q>(to_doubles(low), to_doubles(high)));
}
template <int Q>
static inline VecD flush(VecD sum, VecD a, VecD b) {
  return join<Q>(sum, join<Q>(a, b));
}
