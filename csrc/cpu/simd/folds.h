// Vectors of folds. The fold of entries is the q-norm before its root: the sum of their squares (q = 2), the sum of
// their magnitudes (q = 1), or the largest magnitude (q = infinity). Every fold of a segment is made of these
// operations alone.
#pragma once

#include "vectors.h"

static inline VecF magnitude(VecF v) { return (VecF)((VecI)v & 0x7fffffff); }
static inline VecD magnitude(VecD v) { return (VecD)((VecL)v & 0x7fffffffffffffffll); }

// As integers NaN > infinity > every number, so a maximum of magnitudes never loses a NaN.
static inline VecF larger(VecF a, VecF b) { return (VecF)((VecI)a > (VecI)b ? (VecI)a : (VecI)b); }
static inline VecD larger(VecD a, VecD b) { return (VecD)((VecL)a > (VecL)b ? (VecL)a : (VecL)b); }

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

// The entries of a vector joined, in a fixed order.
template <int Q>
static inline double reduce(VecD v) {
  double entry[kDoubles];
  __builtin_memcpy(entry, &v, sizeof v);
  for (int width = kDoubles / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) {
      if constexpr (Q == kMax) {
        if (!(entry[l + width] <= entry[l]) && entry[l] == entry[l]) entry[l] = entry[l + width];
      } else {
        entry[l] = entry[l] + entry[l + width];
      }
    }
  }
  return entry[0];
}

// A fold in double, joined with the two accumulators a and b of a run of additions.
template <int Q>
static inline VecD flush(VecD sum, VecF a, VecF b) {
  const VecF both = join<Q>(a, b);
  return join<Q>(sum, join<Q>(half_as_doubles<0>(both), half_as_doubles<1>(both)));
}
template <int Q>
static inline VecD flush(VecD sum, VecD a, VecD b) {
  return join<Q>(sum, join<Q>(a, b));
}
