// Every kernel of the module is launched here, and the code that comes back is checked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastsal {

// Launches on a stream of the current device. The kernels of one stream run one after the other.
class Stream {
 public:
  explicit Stream(uintptr_t stream) : stream_(reinterpret_cast<cudaStream_t>(stream)) {}

  template <class... Parameters>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
              Parameters... arguments) const {
    if (blocks == 0) return;
    if (blocks > 2147483647) throw std::runtime_error(std::string(name) + ": the problem is too large for one grid");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    const cudaError_t code = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (code != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(code));
  }

 private:
  cudaStream_t stream_;
};

}  // namespace fastsal
