// Every kernel of the module is launched here, and the code that comes back is checked.
//
// An operator is a chain of kernels, of which each reads what those before it wrote. On devices of compute capability
// 9.0 and later a kernel of a chain is made ready while the one before it still runs: programmatic dependent launch
// (CUDA Programming Guide, section 4.5). All that keeps them in order then is in the kernels, so they all keep to this:
//
// - A kernel that may follow another begins with `wait_for_kernel_before`, which returns when that kernel has ended
//   and its writes can be seen. No access to global memory comes earlier, be it only a read; tests/tensor/backends/test_cuda_build.py
//   looks for one in the machine code.
// - A kernel that may have a follower calls `let_next_kernel_start` thereafter, never before. So no kernel starts until
//   the one before its predecessor has ended too, and none can overwrite what another still reads.
// - The first kernel of a chain is launched plainly: it starts when everything on the stream has ended, the chain
//   before it too. So scratch memory may be used again at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastsal {

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

__device__ __forceinline__ void wait_for_kernel_before() {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaGridDependencySynchronize();
#endif
}

// Once all blocks have called it, the next kernel's blocks take the places that are free and wait.
__device__ __forceinline__ void let_next_kernel_start() {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Whether the kernels of this module wait on the current device, so that they may be launched before their turn, and
// FASTSAL_DEPENDENT_LAUNCH is not 0.
bool dependent_launches();

// The kernels of one operator, in order, on a stream of the current device.
class Chain {
 public:
  explicit Chain(uintptr_t stream) : stream_(reinterpret_cast<cudaStream_t>(stream)) {}

  template <class... Parameters>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              Parameters... arguments) {
    if (blocks == 0) return;
    if (blocks > 2147483647) throw std::runtime_error(std::string(name) + ": the problem is too large for one grid");
    if (launched_ == 1) early_ = dependent_launches();  // asked once, and not where there is one kernel only
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    config.attrs = &early;
    config.numAttrs = early_ ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
    ++launched_;
  }

 private:
  cudaStream_t stream_;
  int launched_ = 0;
  bool early_ = false;
};

}  // namespace fastsal
