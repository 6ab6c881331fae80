// The blocks of a launch.
#pragma once

#include <cuda_runtime_api.h>

#include "cross_entropy/params.h"

namespace jax_flash::cross_entropy {

// kThreads a row; blocks of 256 where those are a warp or less.
template <int kThreads>
struct LaunchShape {
  static constexpr unsigned kRows = kThreads <= 32 ? 256 / kThreads : 1;

  unsigned blocks;
  dim3 threads{kThreads, kRows};

  explicit LaunchShape(int64_t rows) : blocks(static_cast<unsigned>((rows + kRows - 1) / kRows)) {}
};

inline int64_t row_bytes(const Problem& p) { return p.vocabulary * item_bytes(p.dtype); }

inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_flash::cross_entropy
