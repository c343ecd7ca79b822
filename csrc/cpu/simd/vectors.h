// The vectors of one SIMD level, and how elements get into them. A load widens to float or double, which is exact.
#pragma once

constexpr int kBytes = FASTSAL_BYTES;
constexpr int kFloats = kBytes / 4;   // floats in a vector
constexpr int kDoubles = kBytes / 8;  // doubles in a vector

#define FASTSAL_VECTOR(type, bytes) type __attribute__((vector_size(bytes)))
typedef FASTSAL_VECTOR(float, kBytes) VecF;
typedef FASTSAL_VECTOR(int32_t, kBytes) VecI;
typedef FASTSAL_VECTOR(double, kBytes) VecD;
typedef FASTSAL_VECTOR(int64_t, kBytes) VecL;
typedef FASTSAL_VECTOR(float, kBytes / 2) HalfVecF;

template <class V>
static inline V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// Vectors of N elements: floats, their bits, and elements of two bytes.
template <int N>
struct VectorsOf {
  typedef FASTSAL_VECTOR(float, 4 * N) F;
  typedef FASTSAL_VECTOR(uint32_t, 4 * N) U;
  typedef FASTSAL_VECTOR(uint16_t, 2 * N) H;
};

template <int N>
static inline typename VectorsOf<N>::F load_floats(const float* p) {
  return load_vector<typename VectorsOf<N>::F>(p);
}

template <int N>
static inline typename VectorsOf<N>::F load_floats(const BFloat16* p) {
  typedef typename VectorsOf<N>::U U;
  return (typename VectorsOf<N>::F)(__builtin_convertvector(load_vector<typename VectorsOf<N>::H>(p), U) << 16);
}

template <int N>
static inline typename VectorsOf<N>::F load_floats(const Half* p) {
#ifdef FASTSAL_F16C
#if FASTSAL_BYTES == 64
  if constexpr (N == 16) return (typename VectorsOf<N>::F)_mm512_maskz_cvtph_ps(0xffff, load_vector<__m256i>(p));
#endif
  if constexpr (N == 8) return (typename VectorsOf<N>::F)_mm256_cvtph_ps(load_vector<__m128i>(p));
  if constexpr (N == 4) {
    __m128i h = _mm_setzero_si128();
    __builtin_memcpy(&h, p, 8);
    return (typename VectorsOf<N>::F)_mm_cvtph_ps(h);
  }
#else
  // As in to_float, all entries at once, which takes 0.8 of the time of one after another.
  typedef typename VectorsOf<N>::F F;
  typedef typename VectorsOf<N>::U U;
  const U h = __builtin_convertvector(load_vector<typename VectorsOf<N>::H>(p), U);
  const U magnitude = (h & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u, normal = magnitude + (112u << 23);
  const U small = (U)((F)(normal + (1u << 23)) - (F)(U{} + (113u << 23)));
  const U bits = exponent == 0u ? small : exponent == 0x0f800000u ? normal + (112u << 23) : normal;
  return (F)(bits | (h & 0x8000u) << 16);
#endif
}

// The instruction is named where the level has it: left to itself, GCC 12 converts eight floats in two halves.
static inline VecD to_doubles(VectorsOf<kDoubles>::F v) {
#if defined(FASTSAL_F16C) && FASTSAL_BYTES == 64
  return (VecD)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#else
  return __builtin_convertvector(v, VecD);
#endif
}

template <class T>
static inline VecD load_doubles(const T* p) {
  return to_doubles(load_floats<kDoubles>(p));
}
static inline VecD load_doubles(const double* p) { return load_vector<VecD>(p); }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTSAL_SHUFFLE
#endif
#endif

// The first half (Which = 0) or the second (Which = 1) of a vector of floats, as doubles.
template <int Which>
static inline VecD half_as_doubles(VecF v) {
  constexpr int k = Which * kDoubles;
#if defined(FASTSAL_SHUFFLE) && FASTSAL_BYTES == 64
  return to_doubles(__builtin_shufflevector(v, v, k, k + 1, k + 2, k + 3, k + 4, k + 5, k + 6, k + 7));
#elif defined(FASTSAL_SHUFFLE) && FASTSAL_BYTES == 32
  return __builtin_convertvector(__builtin_shufflevector(v, v, k, k + 1, k + 2, k + 3), VecD);
#else
  return __builtin_convertvector(load_vector<HalfVecF>(reinterpret_cast<const float*>(&v) + k), VecD);
#endif
}

// Of a and then of b, the entries 0, 2, 4, ... (First = 0) or 1, 3, 5, ... (First = 1).
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
  for (int l = 0; l < kFloats / 2; ++l) {
    v[l] = a[2 * l + First];
    v[l + kFloats / 2] = b[2 * l + First];
  }
  return v;
#endif
}

// One element on its own, widened to double.
static inline double as_double(double v) { return v; }
static inline double as_double(float v) { return v; }
static inline double as_double(BFloat16 v) { return to_float(v); }
static inline double as_double(Half v) { return to_float(v); }

// A copy of the last `count` elements, padded with zeros, so that they go through the same arithmetic as the others.
template <class T, int N>
struct Padded {
  T value[N] = {};
  Padded(const T* p, int64_t count) { __builtin_memcpy(value, p, static_cast<size_t>(count) * sizeof(T)); }
};
