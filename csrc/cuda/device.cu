// Whether the kernels of this module run on the current device, and which runtime they were linked with.
#include <cuda_runtime.h>

#include "ops.h"

namespace fastsal {
namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  if (code == cudaSuccess) return "";
  cudaGetLastError();  // it is reported here, not by the next launch
  return cudaGetErrorString(code);
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace fastsal
