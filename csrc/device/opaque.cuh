// A value that the compiler must take as it finds it.
#pragma once

#include <cstdint>

namespace jax_flash::device {

// Hides where a value came from, so that the compiler does not compute what follows from it ahead
// of a loop, and then spill it.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The same: an address is computed once, and what lies near it is reached with constant distances.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// This lane: what rare branches make of it is not computed ahead of a loop.
__device__ inline int opaque_lane() { return static_cast<int>(opaque(threadIdx.x) % 32); }

// 0 in a register, not a constant that moves about.
__device__ __forceinline__ float opaque_zero() {
  float x = 0.0f;
  asm volatile("" : "+f"(x));
  return x;
}

// threadIdx.x, read again here instead of kept from the start.
__device__ __forceinline__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

}  // namespace jax_flash::device
