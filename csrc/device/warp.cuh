// Sums and maxima across the lanes of a warp.
#pragma once

#include <cstdint>

namespace jax_flash::device {

inline constexpr uint32_t kWarp = 0xffffffffu;

// x of lane 0, known to the compiler to be the same in the whole warp: what is computed from it
// alone may use the uniform registers, and branches on it do not diverge.
template <typename T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(kWarp, x, 0);
}

// Across the four lanes that share a row of an mma accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kWarp, x, 1);
  return x + __shfl_xor_sync(kWarp, x, 2);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kWarp, x, step));
  return x;
}

// Across kLanes neighbours (a power of two), with no need for the warp's other lanes.
template <int kLanes>
class Lanes {
 public:
  __device__ Lanes() {
    const uint32_t lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
    mask_ = kWarp >> (32 - kLanes) << lane / kLanes * kLanes;
  }
  __device__ __forceinline__ float sum(float x) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(mask_, x, step);
    return x;
  }
  __device__ __forceinline__ float max(float x) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      x = fmaxf(x, __shfl_xor_sync(mask_, x, step));
    }
    return x;
  }

 private:
  uint32_t mask_;
};

// Lane l gets the maximum over lanes 0..l.
__device__ __forceinline__ int32_t inclusive_max(int32_t x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kWarp, x, step);
    if (lane >= step) x = max(x, other);
  }
  return x;
}

}  // namespace jax_flash::device
