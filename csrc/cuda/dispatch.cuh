// From the codes of the Python side to template arguments: the Jacobian's type and the norm, and nothing else.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "fastsal/lanes.h"

namespace fastsal {

template <class T>
struct Type {
  using type = T;
};

template <class F>
auto with_type(int dtype, F f) {
  switch (dtype) {
    case 0:
      return f(Type<float>{});
    case 1:
      return f(Type<double>{});
    case 2:
      return f(Type<Half>{});
    case 3:
      return f(Type<BFloat16>{});
  }
  throw std::runtime_error("dtype: got code " + std::to_string(dtype) + ", wants 0 to 3");
}

template <class F>
void with_norm(int norm, F f) {
  switch (norm) {
    case 0:
      return f(std::integral_constant<int, 0>{});
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
  }
  throw std::runtime_error("norm: got code " + std::to_string(norm) + ", wants 0 to 2");
}

// Device memory behind an integer of the Python side.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace fastsal
