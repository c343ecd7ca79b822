// The vectors of one SIMD level, and how elements get into them. A load widens to float or double, which is exact.
#pragma once

constexpr int kBytes = FASTSAL_BYTES;
constexpr int kFloats = kBytes / 4;   // floats in a vector
constexpr int kDoubles = kBytes / 8;  // doubles in a vector

#define FASTSAL_VECTOR(type, bytes) type __attribute__((vector_size(bytes)))
typedef FASTSAL_VECTOR(float, kBytes) VecF;
typedef FASTSAL_VECTOR(double, kBytes) VecD;

template <class V>
static inline V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// Vectors of N elements: doubles, floats, the bits of floats, and elements of two bytes.
template <int N>
struct VectorsOf {
  typedef FASTSAL_VECTOR(double, 8 * N) D;
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
  typedef typename VectorsOf<N>::F F;
#if FASTSAL_BYTES == 64
  if constexpr (N == 16) return (F)((U)_mm512_maskz_cvtepu16_epi32(0xffff, load_vector<__m256i>(p)) << 16);
#endif
  return (F)(__builtin_convertvector(load_vector<typename VectorsOf<N>::H>(p), U) << 16);
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

// The instruction is named where the level has it: left to itself, GCC 12 converts in two halves.
static inline VecD to_doubles(VectorsOf<kDoubles>::F v) {
#if defined(FASTSAL_F16C) && FASTSAL_BYTES == 64
  return (VecD)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#elif defined(FASTSAL_F16C)
  return (VecD)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, VecD);
#endif
}

template <class T>
static inline VecD load_doubles(const T* p) {
  return to_doubles(load_floats<kDoubles>(p));
}
static inline VecD load_doubles(const double* p) { return load_vector<VecD>(p); }

// The entries I of a and then of b.
template <int... I, class V>
static inline auto pick(V a, V b) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTSAL_SHUFFLE
#endif
#endif
#ifdef FASTSAL_SHUFFLE
  return __builtin_shufflevector(a, b, I...);
#else
  constexpr int n = sizeof(V) / sizeof(a[0]);
  typedef FASTSAL_VECTOR(__typeof__(a[0] + a[0]), sizeof...(I) * sizeof(a[0])) Picked;
  return Picked{(I < n ? a[I % n] : b[I % n])...};
#endif
}

// Of a and then of b, the entries 0, 2, 4, ... (First = 0) or 1, 3, 5, ... (First = 1).
template <int First>
static inline VecF every_second(VecF a, VecF b) {
  constexpr int i = First;
#if FASTSAL_BYTES == 64
  return pick<i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 16, i + 18, i + 20, i + 22, i + 24, i + 26,
              i + 28, i + 30>(a, b);
#elif FASTSAL_BYTES == 32
  return pick<i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14>(a, b);
#else
  return pick<i, i + 2, i + 4, i + 6>(a, b);
#endif
}

// One element on its own, widened to double.
static inline double as_double(double v) { return v; }
static inline double as_double(float v) { return v; }
static inline double as_double(BFloat16 v) { return to_float(v); }
static inline double as_double(Half v) { return to_float(v); }

// A copy of the last `count` < N elements, padded with zeros, so that they go through the same arithmetic as the
// others.
template <class T, int N>
struct Padded {
  T value[N] = {};
  Padded(const T* p, int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#if FASTSAL_BYTES == 64
    // Bytes of unknown number are copied by a call, for which every vector in a register would go to memory.
    const __mmask64 mask = (1ull << bytes) - 1;
    if constexpr (sizeof value == 64) _mm512_storeu_si512(value, _mm512_maskz_loadu_epi8(mask, p));
    if constexpr (sizeof value == 32) _mm256_storeu_si256((__m256i*)value, _mm256_maskz_loadu_epi8(mask, p));
    if constexpr (sizeof value == 16) _mm_storeu_si128((__m128i*)value, _mm_maskz_loadu_epi8(mask, p));
#else
    __builtin_memcpy(value, p, bytes);
#endif
  }
};
template <int N, class T>
static inline Padded<T, N> padded(const T* p, int64_t count) {
  return {p, count};
}
