// The arithmetic that the consumers of the Hopper backward kernels share. S^T and dP^T have keys as
// rows: rS[n][e] of lane l is key l / 4 + 8 (e / 2) of the warp's 16, query 8 n + 2 (l % 4) + e
// % 2.
#pragma once

#include "attention/cuda/sm90/backward_common.cuh"
#include "attention/cuda/sm90/backward_terms.cuh"
#include "device/element.cuh"
#include "device/opaque.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

// P = 2^(scale_log2 S), in place, and in 16 bits as operand A of dV += P^T dO. S begins with
// -lse / scale. Or kHalves: P / 2.
template <typename Element, bool kHalves, int kGroups>
__device__ __forceinline__ void exponentiate(float (&rS)[2 * kGroups][4],
                                             uint32_t (&rP)[kGroups][4], float scale_log2) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const auto exponential = [&](float s) {
        return ptx::exp2_approx(kHalves ? fmaf(s, scale_log2, -1.0f) : s * scale_log2);
      };
      rS[2 * j][e] = exponential(rS[2 * j][e]);
      rS[2 * j + 1][e] = exponential(rS[2 * j + 1][e]);
    }
    device::pack_operand<Element>(rP[j], rS[2 * j], rS[2 * j + 1]);
  }
}

// dS = P * (dP - delta) of the j-th 16 queries, multiplied in pairs of 16 bits.
template <typename Element, int kN>
__device__ __forceinline__ void differentiate(const float (&rDP)[kN][4], const uint32_t (&rP)[4],
                                              const float* delta, int j, uint32_t (&rDS)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(delta + 16 * j + 4 * (threadIdx.x % 4));
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float (&dp)[4] = rDP[2 * j + word / 2];
    const float even = word < 2 ? x.x : x.z, odd = word < 2 ? x.y : x.w;
    rDS[word] = device::multiply<Element>(
        rP[word], device::pack<Element>(dp[word % 2 * 2] - even, dp[word % 2 * 2 + 1] - odd));
  }
}

// The same where dP begins with -delta.
template <typename Element, int kN>
__device__ __forceinline__ void differentiate(const float (&rDP)[kN][4], const uint32_t (&rP)[4],
                                              int j, uint32_t (&rDS)[4]) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float (&dp)[4] = rDP[2 * j + word / 2];
    rDS[word] = device::multiply<Element>(
        rP[word], device::pack<Element>(dp[word % 2 * 2], dp[word % 2 * 2 + 1]));
  }
}

// S^T = K Q^T or dP^T = V dO^T of a warpgroup's 64 keys, which `keys` points to; where kHasTerms on
// top of what add_terms has begun.
template <typename Element, typename KeyTile, bool kHasTerms, typename QueryTile, int kN>
__device__ __forceinline__ void multiply_keys(float (&rD)[kN][4], ptx::MatrixDescriptor keys,
                                              const QueryTile& queries) {
  const ptx::MatrixDescriptor b = ptx::MatrixDescriptor(&queries, 0);
  if constexpr (!kHasTerms) {
    ptx::wgmma_pin(rD);
    ptx::wgmma_fence();
  }
#pragma unroll
  for (int k = 0; k < KeyTile::kCols / 16; ++k) {
    ptx::wgmma<Element, false, false>(
        rD, keys + k / 4 * (KeyTile::kSlabBytes >> 4) + k % 4 * ptx::kColumns16,
        b + k / 4 * (QueryTile::kSlabBytes >> 4) + k % 4 * ptx::kColumns16, kHasTerms || k > 0);
  }
}
// The terms of the queries, the first product of S^T (kKind 0) or dP^T (1).
template <typename Element, int kKind, int kN>
__device__ __forceinline__ void add_terms(float (&rD)[kN][4], const TermTile<8 * kN>& terms,
                                          const Weights& weights) {
  ptx::wgmma_pin(rD);
  ptx::wgmma_fence();
  ptx::wgmma<Element, true, true>(rD, ptx::RepeatedBlock(weights.rows + kKind * kTermParts, 0),
                                  ptx::RepeatedRows(&terms, TermTile<8 * kN>::kSlabBytes), false);
}

// What S^T or dP^T begins with where add_terms does not: the stats of its queries times `factor`. A
// load from shared memory takes 90 to 160 clocks beside wgmma (H200, ncu's samples, 2026-11-28):
// here it is under the product before, and holds no registers.
template <int kN>
__device__ __forceinline__ void begin_scores(float (&rS)[kN][4], const float* stats, float factor,
                                             int quad_lane) {
#pragma unroll
  for (int j = 0; j < kN / 2; ++j) {
    const float4 x = *reinterpret_cast<const float4*>(stats + 16 * j + 4 * quad_lane);
    rS[2 * j][0] = rS[2 * j][2] = x.x * factor;
    rS[2 * j][1] = rS[2 * j][3] = x.y * factor;
    rS[2 * j + 1][0] = rS[2 * j + 1][2] = x.z * factor;
    rS[2 * j + 1][1] = rS[2 * j + 1][3] = x.w * factor;
  }
}

// dV += P^T dO or dK += dS^T Q.
template <typename Element, typename QueryTile, int kN, int kGroups>
__device__ __forceinline__ void accumulate(float (&rD)[kN][4], uint32_t (&rA)[kGroups][4],
                                           const QueryTile& queries) {
  const ptx::MatrixDescriptor b = ptx::MatrixDescriptor(&queries, QueryTile::kSlabBytes);
  ptx::wgmma_pin(rD);
  ptx::wgmma_pin(rA);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kGroups; ++k) {
    ptx::wgmma<Element, true>(rD, rA[k], b + k * ptx::kRows16, true);
  }
}

// Writes a warpgroup's 64 keys of dK or dV, times `scale`, into a tile of shared memory. `address`
// is that of the warp's first row.
template <typename Element, typename Tile, int kN>
__device__ __forceinline__ void stage_gradient(const device::LdmatrixAddress<Tile>& address,
                                               const float (&rD)[kN][4], float scale) {
#pragma unroll
  for (int j = 0; j < kN / 2; ++j) {
    uint32_t packed[4];
    float left[4], right[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      left[e] = rD[2 * j][e] * scale;
      right[e] = rD[2 * j + 1][e] * scale;
    }
    device::pack_operand<Element>(packed, left, right);
    ptx::stmatrix_x4(address(0, 16 * j), packed);
  }
}

// The same, and copies its first `rows` x `cols` to global memory. `barrier` is the warpgroup's.
template <typename Element, typename Tile, int kN>
__device__ __forceinline__ void store_gradient(Tile& tile, const float (&rD)[kN][4], float scale,
                                               Element* destination, int64_t row_stride, int rows,
                                               int cols, int barrier) {
  constexpr int kChunks = kN;
  // NOTE: the thread's index is read again, or it is kept through the steps, and spilled.
  const int thread = device::thread_index() % 128, col = thread % kChunks * 8;
  using Address = device::LdmatrixAddress<Tile>;
  stage_gradient<Element, Tile>(
      Address(tile, Address::Order::kRowsFirst, thread / 32 * 16, thread % 32), rD, scale);
  ptx::named_barrier_sync(barrier, 128);  // The tile is written before others copy it.
#pragma unroll
  for (int first = 0; first < 64; first += 128 / kChunks) {
    const int row = first + thread / kChunks;
    if (row < rows && col < cols) {
      *reinterpret_cast<uint4*>(destination + row * row_stride + col) =
          *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(tile.data) +
                                          Tile::offset(row, col));
    }
  }
  ptx::named_barrier_sync(barrier, 128);  // The tile is copied before it is written again.
}

// Writes a warpgroup's dK or dV as a part of a sum, [n][thread][4].
template <int kN>
__device__ __forceinline__ void store_sum(float* sum, const float (&rD)[kN][4]) {
  float4* target = reinterpret_cast<float4*>(sum) + threadIdx.x % 128;
#pragma unroll
  for (int n = 0; n < kN; ++n) target[n * 128] = {rD[n][0], rD[n][1], rD[n][2], rD[n][3]};
}

}  // namespace jax_flash::attention::sm90
