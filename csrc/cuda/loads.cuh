// How entries come from memory: in packs of 16 bytes where they lie so, else one by one.
#pragma once

#include <cuda_runtime.h>

#include "elements.cuh"
#include "segments.cuh"

namespace fastsal {

FASTSAL_HD inline bool is_aligned(uintptr_t addresses) { return addresses % kPackBytes == 0; }

// Adjacent entries, 16 bytes.
template <class T>
struct Pack {
  T entries[Layout<T>::kPack];
};
template <class T>
__device__ __forceinline__ Pack<T> pack_of(const uint4& words) {
  Pack<T> pack;
  memcpy(&pack, &words, sizeof(pack));
  return pack;
}

// What a lane loads at once; entries from `left` on count as 0. `aligned`: it begins at a multiple of 16 bytes, in
// memory that this kernel does not write, and the row's length is a multiple of a pack.
template <bool aligned, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, int left) {
  if constexpr (aligned) {
    return pack_of<T>(left > 0 ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0));
  } else {
    Pack<T> pack;
#pragma unroll
    for (int c = 0; c < Layout<T>::kPack; ++c) pack.entries[c] = c < left ? from[c] : T{};
    return pack;
  }
}

FASTSAL_HD inline int entry_bytes(int64_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Entries of any dtype, each as float64.
struct Entries {
  const void* first;
  int64_t dtype;

  __device__ double operator()(int64_t k) const {
    switch (dtype) {
      case kFloat32:
        return static_cast<const float*>(first)[k];
      case kFloat64:
        return static_cast<const double*>(first)[k];
      case kFloat16:
        return real(static_cast<const Half*>(first)[k]);
      default:
        return real(static_cast<const BFloat16*>(first)[k]);
    }
  }
  // From entry k on.
  __device__ Entries from(int64_t k) const { return {static_cast<const char*>(first) + k * entry_bytes(dtype), dtype}; }
};

struct Shape {
  int64_t B, n, D;
};

// [B, n, D] with unit stride along D.
struct Rows {
  Entries entries;
  int64_t stride_b, stride_n;

  __device__ Entries operator()(int64_t b, int64_t j) const { return entries.from(b * stride_b + j * stride_n); }
};

// [B, D] with unit stride along D; null entries are none.
struct Vectors {
  Entries entries;
  int64_t stride_b;

  __host__ __device__ explicit operator bool() const { return entries.first; }
  __device__ Entries operator()(int64_t b) const { return entries.from(b * stride_b); }
};

// Stores entry k of a tensor of any dtype, rounded to nearest even.
__device__ inline void store(void* to, int64_t dtype, int64_t k, double v) {
  switch (dtype) {
    case kFloat32:
      static_cast<float*>(to)[k] = static_cast<float>(v);
      break;
    case kFloat64:
      static_cast<double*>(to)[k] = v;
      break;
    case kFloat16:
      static_cast<Half*>(to)[k] = to_float16(static_cast<float>(v));
      break;
    default:
      static_cast<BFloat16*>(to)[k] = to_bfloat16(static_cast<float>(v));
  }
}

}  // namespace fastsal
