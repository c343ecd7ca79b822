// How the entries of a row go through the lanes of vectors: loads, in pairs of vectors, and runs of additions that are
// flushed to double before rounding errors add up.
#pragma once

#include "folds.h"
#include "scaled_folds.h"

// Rows of T in lanes of Scalar: float, or double for float64 rows and wherever the range of float is too small.
template <class T, class Scalar>
struct Lanes {
  static constexpr bool kFloat = sizeof(Scalar) == 4;
  static constexpr int kWidth = kFloat ? kFloats : kDoubles;
  typedef FASTSAL_VECTOR(Scalar, kBytes) Vec;

  template <int N>
  struct Some {
    Vec of[N];
  };

  // One vector of rows or of x, which comes as U.
  template <class U>
  static inline Some<1> load(const U* p) {
    if constexpr (kFloat) {
      return {{load_floats<kFloats>(p)}};
    } else {
      return {{load_doubles(p)}};
    }
  }
  // The two vectors that 2 * kWidth elements make. Two bfloat16 neighbours share a word: one load and two operations
  // give the elements 0, 2, 4, ... and 1, 3, 5, ... An x of floats is put in the same order.
  template <class U>
  static inline Some<2> load_two(const U* p) {
    if constexpr (kFloat && __is_same(U, BFloat16)) {
      auto words = load_vector<typename VectorsOf<kFloats>::U>(p);
#if defined(FASTSAL_F16C)
      __asm__("" : "+v"(words));  // GCC would load it twice, and many a load crosses two cache lines
#endif
      return {{(Vec)(words << 16), (Vec)(words & 0xffff0000u)}};
    } else {
      const Vec low = load(p).of[0], high = load(p + kWidth).of[0];
      if constexpr (kFloat && __is_same(T, BFloat16)) return {{every_second<0>(low, high), every_second<1>(low, high)}};
      return {{low, high}};
    }
  }
};

// A number that is part of its type, so that what is indexed by it is known to the compiler.
template <int N>
struct Index {
  constexpr operator int() const { return N; }
};
// body(0) to body(N - 1), each a constant to the compiler: arrays that are indexed by it alone are registers.
template <int N, class Body>
__attribute__((always_inline)) static inline void each(const Body& body) {
  if constexpr (N > 0) {
    each<N - 1>(body);
    body(Index<N - 1>());
  }
}

// The lanes of the differences of rows of T.
template <class T>
struct OwnLanes : Lanes<T, float> {
  typedef float Scalar;
  static constexpr double kTiny = kTinyFloat;
};
template <>
struct OwnLanes<double> : Lanes<double, double> {
  typedef double Scalar;
  static constexpr double kTiny = kTinyDouble;
};

// The caches that memory is asked into. Rows that are read side by side and needed a row or an example later go into
// the second level: into the first they would compete with the loads for fill buffers, which took 1.03 to 1.07 of the
// time on an idle Xeon.
enum Cache { kSecondLevel = 2, kFirstLevel = 3 };

// Asks for the memory of N vectors `ahead` bytes after p. Always inline, since GCC takes a function that only
// prefetches for pure and drops calls of it.
template <class L, int N, Cache C = kSecondLevel, class T>
__attribute__((always_inline)) static inline void prefetch(const T* p, int64_t ahead) {
  constexpr int kLines = (N * L::kWidth * static_cast<int>(sizeof(T)) + 63) / 64;
  each<kLines>([=](auto line) __attribute__((always_inline)) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead + 64 * line, 0, C);
  });
}

// Takes `len` entries through two accumulators a lane, each of which gets at most N additions before `flush`:
// step(h, k, load), where load(p) has one or two vectors of the row or x at p, from its entry k on, for the
// accumulators h and h + 1; h is an Index.
template <class L, int N, class Step, class Flush>
__attribute__((always_inline)) static inline void in_runs(int64_t len, Step step, Flush flush) {
  constexpr int W = L::kWidth;
  const int64_t whole = len / (2 * W) * (2 * W);
  for (int64_t k = 0; k < len;) {
    const int64_t full = k + 2 * W * N, end = full < whole ? full : whole;
    for (; k < end; k += 2 * W) step(Index<0>(), k, [=](auto p) { return L::load_two(p + k); });
    if (k < full && k < len) {  // the entries that make no two vectors
      if (k + W <= len) {
        step(Index<0>(), k, [=](auto p) { return L::load(p + k); });
        k += W;
      }
      if (k < len) {
        step(Index<1>(), k, [=](auto p) { return L::load(padded<W>(p + k, len - k).value); });
        k = len;
      }
    }
    flush();
  }
}
