// wgmma with operands that stand for more than is in memory: rows that count twice, a block of 8 x
// 8 elements for 64 rows of A.
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"
#include "testing/ptx/launch.h"

namespace jax_flash::testing {
namespace {

template <int kN>
__global__ void __launch_bounds__(128)
    repeated_rows_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  using Tile = device::SharedTile<8, kN>;
  __shared__ Tile tile;
  __shared__ alignas(16) uint16_t block[8][8];
  const int thread = threadIdx.x, lane = thread % 32;
  if (thread < 64) block[thread / 8][thread % 8] = a[thread];
  for (int i = thread; i < 8 * kN; i += 128) {
    tile.data[Tile::offset(i / kN, i % kN) / 2 + i % 8] = b[i];
  }
  ptx::fence_async_shared();
  __syncthreads();  // The operands are there, for wgmma too.

  float rD[kN / 8][4];
  ptx::wgmma_pin(rD);
  ptx::wgmma_fence();
  ptx::wgmma<__nv_bfloat16, true, true>(rD, ptx::RepeatedBlock(block, 0),
                                        ptx::RepeatedRows(&tile, Tile::kSlabBytes), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(rD);
  const int row = thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      d[(row + e / 2 * 8) * kN + 8 * n + lane % 4 * 2 + e % 2] = rD[n][e];
    }
  }
}

}  // namespace

const char* launch_repeated_rows(const uint16_t* a, const uint16_t* b, int n, float* d,
                                 cudaStream_t stream) {
  if (n == 64) {
    repeated_rows_kernel<64><<<1, 128, 0, stream>>>(a, b, d);
  } else if (n == 128) {
    repeated_rows_kernel<128><<<1, 128, 0, stream>>>(a, b, d);
  } else {
    return "n: expected 64 or 128";
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_flash::testing
