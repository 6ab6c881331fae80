// Additions of many CTAs to the same memory: in a fixed order, and in any, where the first is a
// store.
#include <cstdint>

#include "ptx/sm90.cuh"
#include "testing/ptx/launch.h"

namespace jax_flash::testing {
namespace {

constexpr int kColumns = 512;

// CTA b adds its row when `turn` is b.
__global__ void ordered_sum_kernel(const float* source, int columns, float* total, int* turn) {
  __shared__ alignas(16) float buffer[kColumns];
  const int cta = static_cast<int>(blockIdx.x);
  for (int i = threadIdx.x; i < columns; i += blockDim.x) buffer[i] = source[cta * columns + i];
  ptx::fence_async_shared();
  __syncthreads();  // All stores are visible to the copy engine.
  if (threadIdx.x != 0) return;
  while (ptx::load_acquire(turn) != cta) {
  }
  ptx::fence_async_global();
  ptx::bulk_reduce_add(total, buffer, columns * sizeof(float));
  ptx::bulk_commit();
  ptx::bulk_wait<0, false>();
  __threadfence();  // The addition comes before the next turn.
  atomicAdd(turn, 1);
}

// CTA b adds its row to each of the totals, which were not zeroed: who claims one stores. `states`:
// 1 when it is claimed, 2 when it is there.
__global__ void claimed_sum_kernel(const float* source, int columns, int totals, float* total,
                                   int* states) {
  __shared__ alignas(16) float buffer[kColumns];
  const int cta = static_cast<int>(blockIdx.x);
  for (int i = threadIdx.x; i < columns; i += blockDim.x) buffer[i] = source[cta * columns + i];
  ptx::fence_async_shared();
  __syncthreads();  // All stores are visible to the copy engine.
  if (threadIdx.x != 0) return;
  for (int t = 0; t < totals; ++t) {
    float* const sum = total + t * columns;
    int state = ptx::compare_and_swap_acquire(states + t, 0, 1);
    const bool is_first = state == 0;
    if (is_first) {
      ptx::bulk_store(sum, buffer, columns * sizeof(float));
    } else {
      while (state != 2) state = ptx::load_acquire(states + t);
      ptx::fence_async_global();
      ptx::bulk_reduce_add(sum, buffer, columns * sizeof(float));
    }
    ptx::bulk_commit();
    if (is_first) {
      ptx::bulk_wait<0, false>();
      __threadfence();  // The store comes before the word.
      atomicAdd(states + t, 1);
    }
  }
  ptx::bulk_wait<0, false>();
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_ordered_sum(const float* source, int ctas, int columns, float* total,
                               int32_t* turn, cudaStream_t stream) {
  if (columns > kColumns || columns % 4 != 0) return "columns: expected a multiple of 4";
  cudaMemsetAsync(total, 0, columns * sizeof(float), stream);
  cudaMemsetAsync(turn, 0, sizeof(int32_t), stream);
  ordered_sum_kernel<<<ctas, 128, 0, stream>>>(source, columns, total, turn);
  return last_error();
}

const char* launch_claimed_sum(const float* source, int ctas, int columns, int totals, float* total,
                               int32_t* states, cudaStream_t stream) {
  if (columns > kColumns || columns % 4 != 0) return "columns: expected a multiple of 4";
  cudaMemsetAsync(total, 0xff, totals * columns * sizeof(float), stream);
  cudaMemsetAsync(states, 0, totals * sizeof(int32_t), stream);
  claimed_sum_kernel<<<ctas, 128, 0, stream>>>(source, columns, totals, total, states);
  return last_error();
}

}  // namespace jax_flash::testing
