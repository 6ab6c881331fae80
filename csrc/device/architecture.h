// Which kernels may run on the current device. Host code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

namespace jax_flash::device {

// The sm_90a kernels run on compute capability 9.0 and nowhere else. JAX_FLASH_CUDA_KERNELS=sm_80
// turns them off, to compare and to test.
inline bool runs_sm90_kernels() {
  const char* wanted = std::getenv("JAX_FLASH_CUDA_KERNELS");
  if (wanted != nullptr && std::strcmp(wanted, "sm_80") == 0) return false;
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

}  // namespace jax_flash::device
