// The blocks of a launch.
#pragma once

#include <cuda_runtime_api.h>

#include "cross_entropy/params.h"

namespace jax_flash::cross_entropy {

struct LaunchShape {
  unsigned blocks;
  dim3 threads;
};

// A block a row, or, where that is little work, a warp a row: `per_thread` vectors of 16 bytes a
// thread, at most `most` threads.
inline LaunchShape launch_shape(const Problem& p, int per_thread, int most) {
  constexpr int kRowsOfWarps = 8;
  const int64_t vectors = p.vocabulary * item_bytes(p.dtype) / 16;
  unsigned x = 32;
  while (x < static_cast<unsigned>(most) && x * per_thread < vectors) x *= 2;
  const unsigned y = x == 32 ? kRowsOfWarps : 1;
  return {static_cast<unsigned>((p.rows + y - 1) / y), dim3(x, y)};
}

inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_flash::cross_entropy
