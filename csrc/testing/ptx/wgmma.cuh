// D = (C or 0) + A B by every form of wgmma: A from shared memory or registers, either operand
// K-major or MN-major, all widths. Operands are put in shared memory by ordinary stores, twice over
// at the same place, so that fence_async_shared and the waits are on trial as well.
#pragma once

#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"
#include "testing/ptx/launch.h"

namespace jax_flash::testing {

template <typename Element_, bool kRegisterA_, bool kTransposeA_, bool kTransposeB_, int kN_>
struct WgmmaTraits {
  using Element = Element_;
  static constexpr bool kRegisterA = kRegisterA_;
  static constexpr bool kTransposeA = kTransposeA_, kTransposeB = kTransposeB_;
  static constexpr int kM = 128, kN = kN_, kK = 128;  // of what is in shared memory at once
  static constexpr int kThreads = 256;                // a warpgroup for 64 rows

  using A = device::SharedTile<kTransposeA ? kK : kM, kTransposeA ? kM : kK>;
  using B = device::SharedTile<kTransposeB ? kK : kN, kTransposeB ? (kN + 63) / 64 * 64 : kK>;
  struct Shared {
    A a;
    B b;
  };
};

// Rows [0, kRows) and columns [0, cols) of a matrix with rows of `stride` elements; columns past
// `cols` become NaN: nothing may read them.
template <typename Tile, int kThreads>
__device__ void store_tile(Tile& tile, const uint16_t* source, int stride, int cols) {
  constexpr int kChunks = Tile::kCols / 8;
  for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, col = i % kChunks * 8;
    uint4 chunk = {0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff};
    if (col < cols) chunk = *reinterpret_cast<const uint4*>(source + int64_t{row} * stride + col);
    char* const place = reinterpret_cast<char*>(&tile) + Tile::offset(row, col);
    *reinterpret_cast<uint4*>(place) = chunk;
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) wgmma_kernel(const WgmmaProblem p) {
  using A = typename Traits::A;
  using B = typename Traits::B;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kN, kK = Traits::kK, kThreads = Traits::kThreads;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory + p.first_byte);
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, pair = lane % 4 * 2;

  float rD[kN / 8][4];
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) rD[n][e] = p.c[(row + e / 2 * 8) * kN + 8 * n + pair + e % 2];
  }
  const auto a = ptx::MatrixDescriptor(&shared.a, A::kSlabBytes) +
                 warpgroup * (Traits::kTransposeA ? A::kSlabBytes >> 4 : 4 * ptx::kRows16);
  const ptx::MatrixDescriptor b(&shared.b, B::kSlabBytes);

  for (int depth = 0; depth < p.depth; depth += kK) {
    // Fill the operands
    if constexpr (Traits::kTransposeA) {
      store_tile<A, kThreads>(shared.a, p.a + int64_t{depth} * kM, kM, kM);
    } else {
      store_tile<A, kThreads>(shared.a, p.a + depth, p.depth, kK);
    }
    if constexpr (Traits::kTransposeB) {
      store_tile<B, kThreads>(shared.b, p.b + int64_t{depth} * kN, kN, kN);
    } else {
      store_tile<B, kThreads>(shared.b, p.b + depth, p.depth, kK);
    }
    uint32_t rA[kK / 16][4];
    if constexpr (Traits::kRegisterA) {
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t place = int64_t{row + e % 2 * 8} * p.depth + depth + 16 * k + pair;
          rA[k][e] = *reinterpret_cast<const uint32_t*>(p.a + place + e / 2 * 8);
        }
      }
      ptx::wgmma_pin(rA);
    }
    ptx::fence_async_shared();
    __syncthreads();  // the stores of all threads come before the reads of wgmma

    ptx::wgmma_pin(rD);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      const bool accumulate = p.accumulate || depth > 0 || k > 0;
      const uint32_t columns = k % 64 / 16 * ptx::kColumns16, rows = k / 16 * ptx::kRows16;
      const auto block_b =
          b + (Traits::kTransposeB ? rows : columns + k / 64 * (B::kSlabBytes >> 4));
      if constexpr (Traits::kRegisterA) {
        ptx::wgmma<Element, Traits::kTransposeB>(rD, rA[k / 16], block_b, accumulate);
      } else {
        const auto block_a =
            a + (Traits::kTransposeA ? rows : columns + k / 64 * (A::kSlabBytes >> 4));
        ptx::wgmma<Element, Traits::kTransposeA, Traits::kTransposeB>(rD, block_a, block_b,
                                                                      accumulate);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(rD);
    __syncthreads();  // the other warpgroup's wgmma may still read what is overwritten next
  }
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) p.d[(row + e / 2 * 8) * kN + 8 * n + pair + e % 2] = rD[n][e];
  }
}

template <typename Traits>
const char* launch_wgmma_form(const WgmmaProblem& p, cudaStream_t stream) {
  const int bytes = p.first_byte + static_cast<int>(sizeof(typename Traits::Shared));
  auto* const kernel = wgmma_kernel<Traits>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    kernel<<<1, Traits::kThreads, bytes, stream>>>(p);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Element, int kN>
const char* launch_wgmma_width(const WgmmaProblem& p, cudaStream_t stream) {
  if (p.a_in_registers) {
    return p.transpose_b
               ? launch_wgmma_form<WgmmaTraits<Element, true, false, true, kN>>(p, stream)
               : launch_wgmma_form<WgmmaTraits<Element, true, false, false, kN>>(p, stream);
  }
  if (p.transpose_a) {
    return p.transpose_b
               ? launch_wgmma_form<WgmmaTraits<Element, false, true, true, kN>>(p, stream)
               : launch_wgmma_form<WgmmaTraits<Element, false, true, false, kN>>(p, stream);
  }
  return p.transpose_b
             ? launch_wgmma_form<WgmmaTraits<Element, false, false, true, kN>>(p, stream)
             : launch_wgmma_form<WgmmaTraits<Element, false, false, false, kN>>(p, stream);
}

template <typename Element>
const char* launch_wgmma(const WgmmaProblem& p, cudaStream_t stream) {
  switch (p.n) {
    case 64:
      return launch_wgmma_width<Element, 64>(p, stream);
    case 80:
      return launch_wgmma_width<Element, 80>(p, stream);
    case 96:
      return launch_wgmma_width<Element, 96>(p, stream);
    case 128:
      return launch_wgmma_width<Element, 128>(p, stream);
    case 192:
      return launch_wgmma_width<Element, 192>(p, stream);
    case 256:
      return launch_wgmma_width<Element, 256>(p, stream);
  }
  return "n: expected 64, 80, 96, 128, 192 or 256";
}

}  // namespace jax_flash::testing
