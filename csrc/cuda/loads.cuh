// How entries come from memory: those of rows and of x in packs of 16 bytes where they lie so, else one by one.
#pragma once

#include <cuda_runtime.h>

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#endif

#include "elements.cuh"
#include "segments.cuh"

namespace fastsal {

// Where the packs of a row are.
enum class Loads {
  kEntries,   // anywhere: entry by entry
  kReadOnly,  // at multiples of 16 bytes, in device memory that this kernel does not write
  kAligned    // at multiples of 16 bytes, in any memory
};

FASTSAL_HD inline bool is_aligned(uintptr_t addresses) { return addresses % kPackBytes == 0; }

__device__ __forceinline__ uint4 aligned_words(const void* from) {
#if defined(__CUDACC__)
  return *static_cast<const uint4*>(from);
#else
  return __ldg(static_cast<const uint4*>(from));  // tests/cuda_emulation: reports a misaligned load
#endif
}

// The adjacent entries that a lane loads at once; those from `left` on count as 0.
template <class T>
struct Pack {
  T entries[Layout<T>::kPack];
};
template <Loads loads, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, int left) {
  Pack<T> pack;
  if constexpr (loads == Loads::kEntries) {
#pragma unroll
    for (int c = 0; c < Layout<T>::kPack; ++c) {
      T zero{};
      pack.entries[c] = c < left ? from[c] : zero;
    }
  } else {  // the row's length is a multiple of a pack
    uint4 words = make_uint4(0, 0, 0, 0);
    if (left > 0) {
      words = loads == Loads::kReadOnly ? __ldg(reinterpret_cast<const uint4*>(from)) : aligned_words(from);
    }
    memcpy(&pack, &words, sizeof(pack));
  }
  return pack;
}

// x, which comes in the Jacobian's type T or in float32.
template <class T>
struct Input {
  const void* first;
  bool is_float;

  __device__ double operator()(int64_t k) const {
    return is_float ? static_cast<const float*>(first)[k] : real(static_cast<const T*>(first)[k]);
  }
  __device__ int64_t entry_bytes() const { return is_float ? sizeof(float) : sizeof(T); }
  __device__ Input from(int64_t k) const { return {static_cast<const char*>(first) + k * entry_bytes(), is_float}; }
  // Entries k to k + kPack - 1; those from `left` on count as 0. `From` is T or float, as x is; `aligned`: entry k lies
  // at a multiple of 16 bytes, and x is as long as a number of packs.
  template <bool aligned, class From>
  __device__ __forceinline__ void load(int64_t k, int left, double (&x)[Layout<T>::kPack]) const {
    constexpr int kPack = Layout<T>::kPack, kPart = aligned ? Layout<From>::kPack : 1;
    const From* from = static_cast<const From*>(first) + k;
#pragma unroll
    for (int c = 0; c < kPack; c += kPart) {
      if constexpr (aligned) {
        const Pack<From> pack = load_pack<Loads::kAligned>(from + c, left - c);
#pragma unroll
        for (int e = 0; e < kPart; ++e) x[c + e] = real(pack.entries[e]);
      } else {
        x[c] = c < left ? real(from[c]) : 0;
      }
    }
  }
};

// By a whole block: begins to copy `bytes`, a multiple of 16, to shared memory. They are there for all threads after
// `wait_for_copies` and a barrier.
__device__ __forceinline__ void begin_copy(char* to, const void* from, int64_t bytes) {
  for (int64_t at = threadIdx.x * static_cast<int64_t>(kPackBytes); at < bytes; at += blockDim.x * kPackBytes) {
    __pipeline_memcpy_async(to + at, static_cast<const char*>(from) + at, kPackBytes);
  }
}
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

}  // namespace fastsal
