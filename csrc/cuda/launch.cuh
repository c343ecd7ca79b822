// Every kernel of the module is launched here, with template arguments for the codes of the Python side.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "fastsal/types.h"

namespace fastsal {

template <class T>
struct Type {
  using type = T;
};

template <class F>
void with_type(int dtype, F f) {
  switch (dtype) {
    case kFloat32:
      return f(Type<float>{});
    case kFloat64:
      return f(Type<double>{});
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

// Launches on a stream of the current device. The kernels of one stream run one after the other.
template <class... Parameters>
void launch(uintptr_t stream, const char* name, void (*kernel)(Parameters...), int64_t blocks, dim3 threads,
            std::common_type_t<Parameters>... arguments) {
  if (blocks == 0) return;
  if (blocks > 2147483647) throw std::runtime_error(std::string(name) + ": the problem is too large for one grid");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.stream = pointer<std::remove_pointer_t<cudaStream_t>>(stream);
  const cudaError_t code = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (code != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(code));
}

}  // namespace fastsal
