// From the codes of the Python side to template arguments and pointers.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "elements.cuh"

namespace fastsal {

template <class T>
struct Type {
  using type = T;
};

// The types whose sums float64 holds without scaling.
template <class F>
void with_narrow_type(int dtype, F f) {
  switch (dtype) {
    case kFloat32:
      return f(Type<float>{});
    case kFloat16:
      return f(Type<Half>{});
    case kBFloat16:
      return f(Type<BFloat16>{});
  }
  throw std::runtime_error("dtype: got code " + std::to_string(dtype) + ", wants 0 to 3");
}

template <class F>
void with_norm(int norm, F f) {
  switch (norm) {
    case kMax:
      return f(std::integral_constant<int, kMax>{});
    case kL1:
      return f(std::integral_constant<int, kL1>{});
    case kL2:
      return f(std::integral_constant<int, kL2>{});
  }
  throw std::runtime_error("norm: got code " + std::to_string(norm) + ", wants 0 to 2");
}

// Device memory behind an integer of the Python side.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace fastsal
