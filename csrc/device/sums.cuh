// Sums across a warp of several values at once: every step halves the values a lane still carries,
// so that four of them cost six shuffles, not twenty.
#pragma once

#include "device/warp.cuh"

namespace jax_flash::device {

// Over groups of kLanes neighbouring lanes; the same bits in every lane of the group.
template <int kLanes>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

// Over the warp, kCount (a power of two) values: the lanes l with l / (32 / kCount) == i get the
// sum of x[i], bitwise the same in each of them. x is spoiled.
template <int kCount>
__device__ __forceinline__ float warp_sums(float (&x)[kCount]) {
  int step = 16;
#pragma unroll
  for (int n = kCount / 2; n > 0; n /= 2, step /= 2) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float kept = upper ? x[i + n] : x[i], sent = upper ? x[i] : x[i + n];
      x[i] = kept + __shfl_xor_sync(kWarp, sent, step);
    }
  }
  return group_sum<32 / kCount>(x[0]);
}

}  // namespace jax_flash::device
