// How entries come from memory: those of rows in packs of 16 bytes, those of x one by one.
#pragma once

#include <cuda_runtime.h>

#include "elements.cuh"
#include "segments.cuh"

namespace fastsal {

// The adjacent entries that a lane loads at once; those from `left` on count as 0.
template <class T>
struct Pack {
  T entries[Layout<T>::kPack];
};
template <bool aligned, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, int left) {
  Pack<T> pack;
  if constexpr (aligned) {  // and the row's length is a multiple of a pack
    const uint4 words = left > 0 ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
    memcpy(&pack, &words, sizeof(pack));
  } else {
#pragma unroll
    for (int c = 0; c < Layout<T>::kPack; ++c) {
      T zero{};
      pack.entries[c] = c < left ? from[c] : zero;
    }
  }
  return pack;
}

// The entry of x, which comes in the Jacobian's type T or in float32.
template <class T>
struct Input {
  const void* first;
  bool is_float;
  __device__ double operator()(int64_t k) const {
    return is_float ? static_cast<const float*>(first)[k] : real(static_cast<const T*>(first)[k]);
  }
};

}  // namespace fastsal
