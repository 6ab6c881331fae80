// The threads that share a row: some lanes of a warp, a warp, or a block.
#pragma once

#include "device/warp.cuh"

namespace jax_flash::softmax {

struct Max {
  __device__ __forceinline__ static float apply(float x, float y) { return fmaxf(x, y); }
};
struct Sum {
  __device__ __forceinline__ static float apply(float x, float y) { return x + y; }
};

template <int kThreads>
struct Team {
  static constexpr int kLanes = kThreads < 32 ? kThreads : 32;
  static constexpr int kWarps = kThreads / kLanes;
  static constexpr int kBlock = kThreads <= 32 ? 128 : kThreads;  // threads
  static constexpr int kRows = kBlock / kThreads;                 // of a block
  static constexpr int kBlocks = 1024 / kBlock;                   // of an SM: 64 registers a thread

  // All threads get the result, the same bits in each. `partial` is shared memory that nobody else
  // uses in this kernel.
  template <typename Op>
  __device__ __forceinline__ static float reduce(float x, float (&partial)[kWarps]) {
    x = lanes<Op, kLanes>(x);
    if constexpr (kWarps > 1) {
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
      __syncthreads();  // every warp reads what all have written
      x = lanes<Op, kWarps>(partial[threadIdx.x % kWarps]);
    }
    return x;
  }

 private:
  template <typename Op, int kCount>
  __device__ __forceinline__ static float lanes(float x) {
#pragma unroll
    for (int step = kCount / 2; step > 0; step /= 2) {
      x = Op::apply(x, __shfl_xor_sync(device::kWarp, x, step));
    }
    return x;
  }
};

}  // namespace jax_flash::softmax
