// Which kernel a row's width takes.
#pragma once

#include <cuda_runtime_api.h>

#include "softmax/params.h"

namespace jax_flash::softmax {

// Vectors of 16 bytes that a row may touch, wherever it starts.
inline int64_t vectors_of(const Problem& p) {
  const int64_t size = 16 / item_bytes(p.dtype);
  const int64_t shift = p.columns % size == 0 ? 0 : size - 1;
  return (shift + p.columns + size - 1) / size;
}

// Whether rows, and those of the mask, start on vectors.
inline bool is_whole(const Problem& p, const uint8_t* mask) {
  const int64_t size = 16 / item_bytes(p.dtype);
  return p.columns % size == 0 && reinterpret_cast<uintptr_t>(mask) % size == 0;
}

// Calls run.operator()<threads of a row, vectors of a thread>(); <512, 0>: the row is too long to
// be kept.
template <typename Run>
void choose(const Problem& p, Run&& run) {
  const int64_t vectors = vectors_of(p);
  if (vectors <= 8 * 4) return run.template operator()<8, 4>();
  if (vectors <= 32 * 4) return run.template operator()<32, 4>();
  if (vectors <= 64 * 4) return run.template operator()<64, 4>();
  if (vectors <= 256 * 4) return run.template operator()<256, 4>();
  if (vectors <= 512 * 4) return run.template operator()<512, 4>();
  run.template operator()<512, 0>();
}

inline unsigned blocks(const Problem& p, int rows_of_block) {
  return static_cast<unsigned>((p.rows + rows_of_block - 1) / rows_of_block);
}

inline const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_flash::softmax
