// Whether the kernels of this module run on the current device, how they may be launched there, and which runtime they
// were linked with.
#include <cstdlib>
#include <cstring>

#include "launch.cuh"
#include "ops.h"

namespace fastsal {
namespace {

__global__ void probe_kernel() {}

// Of the probe, which was compiled as all other kernels were.
cudaError_t probe(cudaFuncAttributes* attributes) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(probe_kernel));
}

}  // namespace

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t code = probe(&attributes);
  if (code == cudaSuccess) return "";
  cudaGetLastError();  // it is reported here, not by the next launch
  return cudaGetErrorString(code);
}

bool dependent_launches() {
  const char* wanted = std::getenv("FASTSAL_DEPENDENT_LAUNCH");
  if (wanted && std::strcmp(wanted, "0") == 0) return false;
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver < 12030) return false;  // a graph cannot capture such a launch
  cudaFuncAttributes attributes;
  check(probe(&attributes), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;  // PTX for an older device, compiled for this one, does not wait
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

}  // namespace fastsal
