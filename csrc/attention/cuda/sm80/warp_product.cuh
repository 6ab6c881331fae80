// D += A B where a CTA's warps share D as a grid and A and B lie in swizzled shared tiles, each
// either way round. The five products of the backward are five calls.
#pragma once

#include <bit>

#include "attention/cuda/sm80/tile_copy.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::attention::sm80 {

// A [kRows][kCols] result shared by kWarpRows x kWarpCols warps.
template <int kRows, int kCols, int kWarpRows, int kWarpCols>
struct WarpGrid {
  static constexpr int kTileRows = kRows / kWarpRows, kTileCols = kCols / kWarpCols;  // of a warp
  static constexpr int kM = kTileRows / 16, kN = kTileCols / 8;                       // mma tiles
  static constexpr int kSize = kM * kN * 4;  // f32 registers of a lane
  static_assert(std::has_single_bit(static_cast<unsigned>(kTileRows)) && kTileRows >= 16);
  static_assert(std::has_single_bit(static_cast<unsigned>(kTileCols)) && kTileCols >= 16);
  static_assert(kTileRows * kWarpRows == kRows && kTileCols * kWarpCols == kCols);
  using Accumulator = float[kM][kN][4];

  __device__ static int row() { return opaque(threadIdx.x) / 32 / kWarpCols * kTileRows; }
  __device__ static int col() { return opaque(threadIdx.x) / 32 % kWarpCols * kTileCols; }
};

// Where this lane's ldmatrix rows lie within a 16x16 block at (0, 0) of any tile with 64-column
// slabs: matrices 0..3 are (rows 0-7, 8-15, 0-7, 8-15) x (columns 0-7, 0-7, 8-15, 8-15) ...
__device__ __forceinline__ uint32_t rows_first() {
  const int lane = lane_id();
  return device::SharedTile<16, 64>::offset(lane % 8 + lane / 8 % 2 * 8, lane / 16 * 8);
}
// ... or the same with rows and columns exchanged.
__device__ __forceinline__ uint32_t cols_first() {
  const int lane = lane_id();
  return device::SharedTile<16, 64>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
}

// One operand of a warp's product, in a tile [mn][k] or, kIsTransposed, [k][mn]; `origin` is the
// warp's first m or n. A 16x16 block comes as the four registers of an mma operand A, or as two
// operands B: registers 0 and 1 for columns 0-7, 2 and 3 for 8-15.
template <typename Tile, bool kIsTransposed>
class Operand {
 public:
  __device__ __forceinline__ Operand(const Tile& tile, uint32_t lane_offset, int origin) {
    static_assert(Tile::kSlabCols == 64);
    const uint32_t address = opaque(ptx::shared_address(&tile) + lane_offset);
    base_ = kIsTransposed ? (address ^ origin % 64 * 2) + origin / 64 * Tile::kSlabBytes
                          : address + origin * Tile::kRowBytes;
  }
  // NOTE: for a transposed operand mn must not carry into the bits of origin: the warp's share of
  // the axis is a power of two.
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], int mn, int k) const {
    const int row = kIsTransposed ? k : mn, col = kIsTransposed ? mn : k;
    const uint32_t address =
        (base_ ^ col % 64 * 2) + (col / 64 * Tile::kSlabBytes + row * Tile::kRowBytes);
    if constexpr (kIsTransposed) {
      ptx::ldmatrix_x4_trans(fragment, address);
    } else {
      ptx::ldmatrix_x4(fragment, address);
    }
  }

 private:
  uint32_t base_;
};

// D[m][n] += sum over k < kDepth of A[m][k] B[k][n], for this warp's part of the grid.
template <typename Element, int kDepth, typename A, typename B, int kM, int kN>
__device__ __forceinline__ void multiply_add(float (&d)[kM][kN][4], const A& a, const B& b) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t rA[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) a.load(rA[m], 16 * m, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t rB[4];
      b.load(rB, 8 * n, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_16x8x16<Element>(d[m][n], rA[m], rB[0], rB[1]);
        ptx::mma_16x8x16<Element>(d[m][n + 1], rA[m], rB[2], rB[3]);
      }
    }
  }
}

}  // namespace jax_flash::attention::sm80
