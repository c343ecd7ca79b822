// The inner loops, written with vector extensions and included once per SIMD level inside its own namespace, with the
// macros FASTSAL_BYTES (vector width) and FASTSAL_F16C (hardware half conversion). No header may be included from here:
// a standard inline function compiled for AVX-512 could be the copy the linker keeps for everybody.
//
// Every pair of rows sees the same sequence of operations whichever tile it is computed in.

constexpr int kBytes = FASTSAL_BYTES;
constexpr int kLanes = kBytes / 4;      // floats in a vector
constexpr int kHalfLanes = kBytes / 8;  // doubles in a vector

#define FASTSAL_VECTOR(type, bytes) type __attribute__((vector_size(bytes)))
typedef FASTSAL_VECTOR(float, kBytes) VecF;
typedef FASTSAL_VECTOR(int32_t, kBytes) VecI;
typedef FASTSAL_VECTOR(double, kBytes) VecD;
typedef FASTSAL_VECTOR(int64_t, kBytes) VecL;
typedef FASTSAL_VECTOR(float, kBytes / 2) HalfF;

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class V>
static inline V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <int N>
struct Lanes {
  typedef FASTSAL_VECTOR(float, 4 * N) F;
  typedef FASTSAL_VECTOR(uint32_t, 4 * N) U;
  typedef FASTSAL_VECTOR(uint16_t, 2 * N) H;
};

template <int N>
static inline typename Lanes<N>::F load_floats(const float* p) {
  return load_vector<typename Lanes<N>::F>(p);
}

template <int N>
static inline typename Lanes<N>::F load_floats(const BFloat* p) {
  typedef typename Lanes<N>::U U;
  return (typename Lanes<N>::F)(__builtin_convertvector(load_vector<typename Lanes<N>::H>(p), U) << 16);
}

template <int N>
static inline typename Lanes<N>::F load_floats(const Half* p) {
#ifdef FASTSAL_F16C
#if FASTSAL_BYTES == 64
  if constexpr (N == 16) return (typename Lanes<N>::F)_mm512_maskz_cvtph_ps(0xffff, load_vector<__m256i>(p));
#endif
  if constexpr (N == 8) return (typename Lanes<N>::F)_mm256_cvtph_ps(load_vector<__m128i>(p));
  if constexpr (N == 4) {
    __m128i h = _mm_setzero_si128();
    __builtin_memcpy(&h, p, 8);
    return (typename Lanes<N>::F)_mm_cvtph_ps(h);
  }
#else
  // Exponents are moved in integers; a subnormal half gets an exponent bit that a float subtraction takes off again, so
  // that no subnormal float appears (it could be flushed to zero).
  typedef typename Lanes<N>::F F;
  typedef typename Lanes<N>::U U;
  const U h = __builtin_convertvector(load_vector<typename Lanes<N>::H>(p), U);
  const U magnitude = (h & 0x7fffu) << 13;
  const U exponent = magnitude & 0x0f800000u;
  U bits = magnitude + (112u << 23);
  bits = exponent == 0x0f800000u ? bits + (112u << 23) : bits;
  const U low = (U)((F)(bits + (1u << 23)) - (F)(U{} + (113u << 23)));
  bits = exponent == 0u ? low : bits;
  return (F)(bits | ((h & 0x8000u) << 16));
#endif
}

// Named where the level is known: GCC 12 converts eight floats in two halves.
static inline VecD to_doubles(Lanes<kHalfLanes>::F v) {
#if defined(FASTSAL_F16C) && FASTSAL_BYTES == 64
  return (VecD)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#else
  return __builtin_convertvector(v, VecD);
#endif
}

template <class T>
static inline VecD load_doubles(const T* p) {
  return to_doubles(load_floats<kHalfLanes>(p));
}
static inline VecD load_doubles(const double* p) { return load_vector<VecD>(p); }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTSAL_SHUFFLE
#endif
#endif

static inline VecD low_half(VecF v) {
#if defined(FASTSAL_SHUFFLE) && FASTSAL_BYTES == 64
  return to_doubles(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
#elif defined(FASTSAL_SHUFFLE) && FASTSAL_BYTES == 32
  return __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3), VecD);
#else
  return __builtin_convertvector(load_vector<HalfF>(&v), VecD);
#endif
}

static inline VecD high_half(VecF v) {
#if defined(FASTSAL_SHUFFLE) && FASTSAL_BYTES == 64
  return to_doubles(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#elif defined(FASTSAL_SHUFFLE) && FASTSAL_BYTES == 32
  return __builtin_convertvector(__builtin_shufflevector(v, v, 4, 5, 6, 7), VecD);
#else
  return __builtin_convertvector(load_vector<HalfF>(reinterpret_cast<const char*>(&v) + sizeof(HalfF)), VecD);
#endif
}

// Entries 0, 2, 4, ... (First = 0) or 1, 3, 5, ... (1) of a and then b.
template <int First>
static inline VecF every_second(VecF a, VecF b) {
#if defined(FASTSAL_SHUFFLE) && FASTSAL_BYTES == 64
  return __builtin_shufflevector(a, b, First, First + 2, First + 4, First + 6, First + 8, First + 10, First + 12,
                                 First + 14, First + 16, First + 18, First + 20, First + 22, First + 24, First + 26,
                                 First + 28, First + 30);
#elif defined(FASTSAL_SHUFFLE) && FASTSAL_BYTES == 32
  return __builtin_shufflevector(a, b, First, First + 2, First + 4, First + 6, First + 8, First + 10, First + 12,
                                 First + 14);
#else
  VecF v;
  for (int l = 0; l < kLanes / 2; ++l) {
    v[l] = a[2 * l + First];
    v[l + kLanes / 2] = b[2 * l + First];
  }
  return v;
#endif
}

static inline VecF magnitude(VecF v) { return (VecF)((VecI)v & 0x7fffffff); }
static inline VecD magnitude(VecD v) { return (VecD)((VecL)v & 0x7fffffffffffffffll); }

// As integers NaN > infinity > every number, so a maximum of magnitudes never loses a NaN.
static inline VecF larger(VecF a, VecF b) { return (VecF)((VecI)a > (VecI)b ? (VecI)a : (VecI)b); }
static inline VecD larger(VecD a, VecD b) { return (VecD)((VecL)a > (VecL)b ? (VecL)a : (VecL)b); }

template <int Q, class V>
static inline V term(V d) {
  return Q == kL2 ? d * d : magnitude(d);
}
template <int Q, class V>
static inline V join(V sum, V t) {
  if constexpr (Q == kMax) return larger(sum, t);
  return sum + t;
}

// a * b + sum, rounded once where the level has the instruction: named, since -ffp-contract=off keeps the compiler from
// choosing it for one tile and not for another.
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

// The q-sum with one more entry d.
template <int Q, class V>
static inline V accumulate(V sum, V d) {
  if constexpr (Q == kL2) return multiply_add(d, d, sum);
  return join<Q>(sum, term<Q>(d));
}

template <int Q>
static inline double reduce(VecD v) {
  double lane[kHalfLanes];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int width = kHalfLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) {
      if constexpr (Q == kMax) {
        if (!(lane[l + width] <= lane[l]) && lane[l] == lane[l]) lane[l] = lane[l + width];
      } else {
        lane[l] = lane[l] + lane[l + width];
      }
    }
  }
  return lane[0];
}

static inline double as_double(double v) { return v; }
static inline double as_double(float v) { return v; }
static inline double as_double(BFloat v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
static inline double as_double(Half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const double m = exponent == 31  ? (fraction ? __builtin_nan("") : __builtin_inf())
                   : exponent == 0 ? fraction * 0x1p-24
                                   : __builtin_ldexp(1024 + fraction, exponent - 25);
  return v.bits & 0x8000 ? -m : m;
}

// ---- The slow paths, scalar, in double, for the rare segment that leaves the range of the fast ones. ----

// Kept in blocks, like the vector sums, so that a long sum of equal terms does not drift.
struct BlockSum {
  double total = 0, block = 0;
  int count = 0;
  void add(double v) {
    block += v;
    if (++count == 64) {
      total += block;
      block = count = 0;
    }
  }
  double value() const { return total + block; }
};

// 2^e as two factors, each in range.
struct Power {
  double first, second;
  explicit Power(int64_t e)
      : first(__builtin_ldexp(1.0, static_cast<int>(e / 2))),
        second(__builtin_ldexp(1.0, static_cast<int>(e - e / 2))) {}
};

template <int Q, class Get>
static Scaled scaled_norm(const Get& get, int64_t len) {
  double top = 0;
  for (int64_t k = 0; k < len; ++k) {
    const double v = __builtin_fabs(get(k));
    if (!(v <= top) && top == top) top = v;
  }
  if (top == 0 || !__builtin_isfinite(top) || Q == kMax) return {top, 0};
  const int64_t e = __builtin_ilogb(top);
  const Power down(-e);
  BlockSum sum;
  for (int64_t k = 0; k < len; ++k) {
    const double v = __builtin_fabs(get(k)) * down.first * down.second;
    sum.add(Q == kL2 ? v * v : v);
  }
  return {sum.value(), Q == kL2 ? 2 * e : e};
}

template <class GetX, class GetV>
static Scaled scaled_dot(const GetX& x, const GetV& v, int64_t len) {
  constexpr int64_t kNone = -(1 << 20);
  int64_t top = kNone;
  double special = 0;
  bool finite = true;
  for (int64_t k = 0; k < len; ++k) {
    const double a = x(k), b = v(k);
    if (!__builtin_isfinite(a) || !__builtin_isfinite(b)) {
      special += a * b;
      finite = false;
    } else if (a != 0 && b != 0) {
      const int64_t e = static_cast<int64_t>(__builtin_ilogb(a)) + __builtin_ilogb(b);
      if (e > top) top = e;
    }
  }
  if (!finite) return {special, 0};
  if (top == kNone) return {0, 0};
  BlockSum sum;
  for (int64_t k = 0; k < len; ++k) {
    int ea, eb;
    const double a = __builtin_frexp(x(k), &ea), b = __builtin_frexp(v(k), &eb);
    if (a != 0 && b != 0) sum.add(__builtin_ldexp(a * b, static_cast<int>(ea + eb - top)));
  }
  return {sum.value(), top};
}

// Below this a sum of `len` terms could have lost digits to underflow (flush to zero assumed).
static inline bool in_range(double sum, int64_t len, double tiny) {
  const double v = sum < 0 ? -sum : sum;
  return v >= static_cast<double>(len) * tiny && v <= __DBL_MAX__;
}
constexpr double kTinyFloat = 0x1p-100, kTinyDouble = 0x1p-960;

// ---- Stage 1 ----

template <class T>
struct Compute {
  typedef float Scalar;
  typedef VecF Vec;
  static constexpr int kWidth = kLanes;
  static constexpr double kTiny = kTinyFloat;
  static inline Vec load(const T* p) { return load_floats<kLanes>(p); }
  // One of the two vectors that 2 * kWidth elements make, of a row or of x. Two bfloat16 neighbours share a word: one
  // load and two operations give the elements 0, 2, 4, ... and 1, 3, 5, ...
  static inline Vec load_of_two(int which, const T* p) {
    if constexpr (__is_same(T, BFloat)) {
      const auto words = load_vector<typename Lanes<kLanes>::U>(p);
      return (Vec)(which == 0 ? words << 16 : words & 0xffff0000u);
    } else {
      return load(p + which * kWidth);
    }
  }
  static inline Vec load_x_of_two(int which, const float* x) {
    const Vec low = load_vector<Vec>(x), high = load_vector<Vec>(x + kWidth);
    if constexpr (__is_same(T, BFloat)) return which == 0 ? every_second<0>(low, high) : every_second<1>(low, high);
    return which == 0 ? low : high;
  }
};
template <>
struct Compute<double> {
  typedef double Scalar;
  typedef VecD Vec;
  static constexpr int kWidth = kHalfLanes;
  static constexpr double kTiny = kTinyDouble;
  static inline Vec load(const double* p) { return load_vector<VecD>(p); }
  static inline Vec load_of_two(int which, const double* p) { return load(p + which * kWidth); }
  static inline Vec load_x_of_two(int which, const double* x) { return load(x + which * kWidth); }
};

template <int Q>
static inline VecD flush(VecD sum, VecF a, VecF b) {
  const VecF both = join<Q>(a, b);
  return join<Q>(sum, join<Q>(low_half(both), high_half(both)));
}
template <int Q>
static inline VecD flush(VecD sum, VecD a, VecD b) {
  return join<Q>(sum, join<Q>(a, b));
}

// A copy of the last elements, padded with zeros, so that they go through the same arithmetic.
template <class T, int N>
struct Padded {
  T value[N] = {};
  Padded(const T* p, int64_t count) { __builtin_memcpy(value, p, static_cast<size_t>(count) * sizeof(T)); }
};

// One segment again, in double lanes (float rows), where float32 lanes ran out of range.
template <int Q, class T>
__attribute__((noinline)) static Scaled exact_norm(const T* a, const T* r, int64_t len) {
  VecD sum = {};
  int64_t k = 0;
  for (; k + kHalfLanes <= len; k += kHalfLanes) sum = accumulate<Q>(sum, load_doubles(a + k) - load_doubles(r + k));
  if (k < len) {
    const Padded<T, kHalfLanes> ta(a + k, len - k), tr(r + k, len - k);
    sum = accumulate<Q>(sum, load_doubles(ta.value) - load_doubles(tr.value));
  }
  return {reduce<Q>(sum), 0};
}
template <int Q>
__attribute__((noinline)) static Scaled exact_norm(const double* a, const double* r, int64_t len) {
  return scaled_norm<Q>([=](int64_t k) { return a[k] - r[k]; }, len);
}

template <class T, class X>
__attribute__((noinline)) static Scaled exact_dot(const T* a, const T* r, const X* x, int64_t len) {
  return scaled_dot([=](int64_t k) { return static_cast<double>(x[k]); },
                    [=](int64_t k) { return as_double(a[k]) - as_double(r[k]); }, len);
}

// Float additions in a row before a lane is flushed to double, by each of two accumulators; one more may follow at the
// end of a segment, so 32 is the most.
constexpr int kAdds = 31;
constexpr int kBlockRows = kBytes == 64 ? 10 : 4;

template <int A, int R>
struct TileSums {
  VecD norm[A][R], dot[A][R];
};

template <int Q, class T, int A, int R, bool X>
__attribute__((always_inline)) static inline TileSums<A, R> tile_sums(const T* const* anchors, const T* const* rows,
                                                                      const typename Compute<T>::Scalar* x, int64_t len,
                                                                      const char* const* ahead) {
  typedef Compute<T> C;
  typedef typename C::Vec Vec;
  typedef typename C::Scalar Scalar;
  constexpr int W = C::kWidth;
  constexpr int kPrefetchEvery = 64 / (W * sizeof(T)) > 1 ? 64 / (W * sizeof(T)) : 1;  // vectors in a cache line
  TileSums<A, R> sums;
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
        n_acc[h][i][r] = accumulate<Q>(n_acc[h][i][r], d);
        if constexpr (X) d_acc[h][i][r] = multiply_add(xv, d, d_acc[h][i][r]);
      }
    }
  };
  // Into the second level cache: fetched to the first it would compete with the loads for fill buffers.
  // Always inline: GCC takes a function that only prefetches for pure, and drops calls of it.
  auto prefetch = [&](int64_t k) __attribute__((always_inline)) {
    for (int r = 0; ahead && r < R; ++r) {
      for (int b = 0; b < 2; b += kPrefetchEvery) __builtin_prefetch(ahead[r] + (k + b * W) * sizeof(T), 0, 2);
    }
  };
  auto drain = [&] {
    for (int i = 0; i < A; ++i) {
      for (int r = 0; r < R; ++r) {
        sums.norm[i][r] = flush<Q>(sums.norm[i][r], n_acc[0][i][r], n_acc[1][i][r]);
        if constexpr (X) sums.dot[i][r] = flush<kL1>(sums.dot[i][r], d_acc[0][i][r], d_acc[1][i][r]);
      }
    }
  };

  const int64_t whole = len / (2 * W) * (2 * W);
  for (int64_t k = 0; k < len;) {
    const int64_t end = k + 2 * W * kAdds < whole ? k + 2 * W * kAdds : whole;
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
    drain();
  }
  return sums;
}

template <int Q, class T>
static inline Scaled tile_norm(VecD sum, const T* anchor, const T* row, int64_t len) {
  const double n = reduce<Q>(sum);
  return in_range(n, len, Compute<T>::kTiny) ? Scaled{n, 0} : exact_norm<Q>(anchor, row, len);
}

template <int Q, class T, int A, int R, bool X>
static void tile(const T* const* anchors, const T* const* rows, const typename Compute<T>::Scalar* x, int64_t len,
                 const char* const* ahead, Scaled* norm, Scaled* dot, Strides out) {
  const TileSums<A, R> sums = tile_sums<Q, T, A, R, X>(anchors, rows, x, len, ahead);
  for (int i = 0; i < A; ++i) {
    for (int r = 0; r < R; ++r) {
      const int64_t at = i * out.anchor + r * out.row;
      norm[at] = tile_norm<Q>(sums.norm[i][r], anchors[i], rows[r], len);
      if constexpr (X) {
        const double p = reduce<kL1>(sums.dot[i][r]);
        dot[at] = in_range(p, len, Compute<T>::kTiny) ? Scaled{p, 0} : exact_dot(anchors[i], rows[r], x, len);
      }
    }
  }
}

template <int Q, class T, bool X>
static void tile_rows(const T* const* anchors, int n_anchors, const T* const* rows, int n_rows,
                      const typename Compute<T>::Scalar* x, int64_t len, const char* const* ahead, Scaled* norm,
                      Scaled* dot, Strides out) {
  if constexpr (!X && kBytes == 64) {
    if (n_anchors == 2 && n_rows == 4) return tile<Q, T, 2, 4, X>(anchors, rows, x, len, ahead, norm, dot, out);
  }
  for (int i = 0; i < n_anchors; ++i) {
    Scaled* d = X ? dot + i * out.anchor : nullptr;
    Scaled* n = norm + i * out.anchor;
    if constexpr (!X && kBlockRows > 4) {
      switch (n_rows) {
        case 10:
          tile<Q, T, 1, 10, X>(anchors + i, rows, x, len, ahead, n, d, out);
          continue;
        case 9:
          tile<Q, T, 1, 9, X>(anchors + i, rows, x, len, ahead, n, d, out);
          continue;
        case 8:
          tile<Q, T, 1, 8, X>(anchors + i, rows, x, len, ahead, n, d, out);
          continue;
        case 7:
          tile<Q, T, 1, 7, X>(anchors + i, rows, x, len, ahead, n, d, out);
          continue;
        case 6:
          tile<Q, T, 1, 6, X>(anchors + i, rows, x, len, ahead, n, d, out);
          continue;
        case 5:
          tile<Q, T, 1, 5, X>(anchors + i, rows, x, len, ahead, n, d, out);
          continue;
        default:
          break;
      }
    }
    switch (n_rows) {
      case 4:
        tile<Q, T, 1, 4, X>(anchors + i, rows, x, len, ahead, n, d, out);
        break;
      case 3:
        tile<Q, T, 1, 3, X>(anchors + i, rows, x, len, ahead, n, d, out);
        break;
      case 2:
        tile<Q, T, 1, 2, X>(anchors + i, rows, x, len, ahead, n, d, out);
        break;
      default:
        tile<Q, T, 1, 1, X>(anchors + i, rows, x, len, ahead, n, d, out);
    }
  }
}

template <int Q, class T>
static void tile_entry(const void* const* anchors, int n_anchors, const void* const* rows, int n_rows, const void* x,
                       int64_t len, const void* const* ahead, Scaled* norm, Scaled* dot, Strides out) {
  const T* a[kTileAnchors];
  const T* r[kMaxRows];
  const char* next[kMaxRows];
  for (int i = 0; i < n_anchors; ++i) a[i] = static_cast<const T*>(anchors[i]);
  for (int i = 0; i < n_rows; ++i) r[i] = static_cast<const T*>(rows[i]);
  if (ahead) {
    for (int i = 0; i < n_rows; ++i) next[i] = static_cast<const char*>(ahead[i]);
  }
  const auto* xs = static_cast<const typename Compute<T>::Scalar*>(x);
  const char* const* hint = ahead ? next : nullptr;
  if (x) {
    tile_rows<Q, T, true>(a, n_anchors, r, n_rows, xs, len, hint, norm, dot, out);
  } else {
    tile_rows<Q, T, false>(a, n_anchors, r, n_rows, xs, len, hint, norm, dot, out);
  }
}

// The same one row after the other. The sums are reduced last: in between that would hold up the reading.
template <int Q, class T>
static void in_turn(const void* const* anchors, int, const void* const* rows, int n_rows, const void*, int64_t len,
                    const void* const* ahead, Scaled* norm, Scaled*, Strides out) {
  const T* anchor = static_cast<const T*>(anchors[0]);
  VecD sums[kMaxRows];
  auto sum = [=](const T* row, const char* const* next) __attribute__((always_inline)) {
    return tile_sums<Q, T, 1, 1, false>(&anchor, &row, nullptr, len, next).norm[0][0];
  };
  for (int r = 0; r < n_rows; ++r) {
    const T* row = static_cast<const T*>(rows[r]);
    const char* next = ahead ? static_cast<const char*>(ahead[r]) : nullptr;
    sums[r] = ahead ? sum(row, &next) : sum(row, nullptr);
  }
  for (int r = 0; r < n_rows; ++r) {
    norm[r * out.row] = tile_norm<Q>(sums[r], anchor, static_cast<const T*>(rows[r]), len);
  }
}

// ---- Stage 2: double lanes, blocks of kBlock additions so that constant rows do not drift. ----

constexpr int kBlock = 32;

template <int Q, class T, class X>
static void two_row(const void* g_ptr, const void* row_ptr, const void* x_ptr, int64_t len, const char* ahead,
                    TwoRow* out) {
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

// ---- Backward of pairwise_margins ----

template <class T>
static void upcast(const void* from, int64_t len, double* to) {
  const T* p = static_cast<const T*>(from);
  int64_t k = 0;
  for (; k + kHalfLanes <= len; k += kHalfLanes) {
    const VecD v = load_doubles(p + k);
    __builtin_memcpy(to + k, &v, sizeof v);
  }
  for (; k < len; ++k) to[k] = as_double(p[k]);
}

constexpr int kPushVectors = kBytes == 64 ? 8 : 4;
constexpr int64_t kChunk = kPushVectors * kHalfLanes;

template <int Q>
static void push(const double* rows, int64_t n, int64_t i, const double* w, double* out) {
  VecD own[kPushVectors], sum[kPushVectors];
  for (int v = 0; v < kPushVectors; ++v) {
    own[v] = load_vector<VecD>(rows + i * kChunk + v * kHalfLanes);
    sum[v] = VecD{};
  }
  for (int64_t j = 0; j < n; ++j) {
    const VecD weight = VecD{} + w[j];
    for (int v = 0; v < kPushVectors; ++v) {
      VecD d = own[v] - load_vector<VecD>(rows + j * kChunk + v * kHalfLanes);
      if constexpr (Q == kL1) d = d > 0.0 ? VecD{} + 1.0 : d < 0.0 ? VecD{} - 1.0 : d;  // 0 and NaN stay
      sum[v] = multiply_add(weight, d, sum[v]);
    }
  }
  __builtin_memcpy(out, sum, sizeof sum);
}

#define FASTSAL_TYPES(f, q) {f<q, float>, f<q, double>, f<q, Half>, f<q, BFloat>}
#define FASTSAL_TWO_ROW(q)                                                                                         \
  {                                                                                                                \
    {two_row<q, float, float>, two_row<q, float, float>}, {two_row<q, double, double>, two_row<q, double, float>}, \
        {two_row<q, Half, Half>, two_row<q, Half, float>}, {                                                       \
      two_row<q, BFloat, BFloat>, two_row<q, BFloat, float>                                                        \
    }                                                                                                              \
  }

static constexpr Kernels kTable = {
    FASTSAL_LEVEL,
    kBlockRows,
    kChunk,
    {FASTSAL_TYPES(tile_entry, kMax), FASTSAL_TYPES(tile_entry, kL1), FASTSAL_TYPES(tile_entry, kL2)},
    {FASTSAL_TYPES(in_turn, kMax), FASTSAL_TYPES(in_turn, kL1), FASTSAL_TYPES(in_turn, kL2)},
    {FASTSAL_TWO_ROW(kMax), FASTSAL_TWO_ROW(kL1), FASTSAL_TWO_ROW(kL2)},
    {FASTSAL_TYPES(gap, kMax), FASTSAL_TYPES(gap, kL1), FASTSAL_TYPES(gap, kL2)},
    {upcast<float>, upcast<double>, upcast<Half>, upcast<BFloat>},
    {nullptr, push<kL1>, push<kL2>},
};
