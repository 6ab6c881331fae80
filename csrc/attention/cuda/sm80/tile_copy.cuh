// Tiles between tensors and shared memory, and accumulators into shared tiles.
#pragma once

#include "device/element.cuh"
#include "device/opaque.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::attention::sm80 {

using device::opaque;

__device__ __forceinline__ int lane_id() { return opaque(threadIdx.x) % 32; }

// Copies `rows` rows of `cols` elements into the tile with cp.async and fills up with zeros. The
// caller commits and waits. `source` is the first row.
template <int kThreads, typename Element, typename Tile>
__device__ __forceinline__ void load_rows(Tile& tile, const Element* source, int64_t row_stride,
                                          int rows, int cols) {
  constexpr int kChunks = Tile::kCols / 8, kRowStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && Tile::kRows % kRowStep == 0);
  const int thread = opaque(threadIdx.x), first = thread / kChunks, col = thread % kChunks * 8;
  source += first * row_stride + col;
  if (col >= cols) rows = 0;
#pragma unroll
  for (int i = 0; i < Tile::kRows; i += kRowStep, source += kRowStep * row_stride) {
    ptx::cp_async_16(ptx::shared_address(&tile) + Tile::offset(first + i, col), source,
                     first + i < rows ? 16 : 0);
  }
}

// Calls visit(n, half, pair) for rows [16 m, 16 m + 16) of this warp's part of a WarpGrid, where
// pair is the tile's place for the accumulator's elements 2 half and 2 half + 1, 16 bits each.
template <class Warps, typename Tile, typename Visit>
__device__ __forceinline__ void for_fragments(Tile& tile, int m, const Visit& visit) {
  const int lane = lane_id();
  char* data = reinterpret_cast<char*>(tile.data);
  const uint32_t origin = Tile::offset(Warps::row() + lane / 4, Warps::col()) + lane % 4 * 4;
#pragma unroll
  for (int n = 0; n < Warps::kN; ++n) {
    // The warp's columns begin at a multiple of their number, a power of two: no carry.
    const uint32_t offset =
        (origin ^ n % 8 * 16) + n / 8 * Tile::kSlabBytes + 16 * m * Tile::kRowBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      visit(n, half, *reinterpret_cast<uint32_t*>(data + offset + half * 8 * Tile::kRowBytes));
    }
  }
}

// Writes scale * D.
template <typename Element, class Warps, typename Tile>
__device__ __forceinline__ void store_accumulator(Tile& tile, const typename Warps::Accumulator& rD,
                                                  float scale) {
#pragma unroll
  for (int m = 0; m < Warps::kM; ++m) {
    for_fragments<Warps>(tile, m, [&](int n, int half, uint32_t& pair) {
      pair = device::pack<Element>(rD[m][n][2 * half] * scale, rD[m][n][2 * half + 1] * scale);
    });
  }
}

// Copies rows [0, rows) and columns [0, cols) of the tile to `destination`, 16 bytes a thread.
template <int kThreads, typename Element, typename Tile>
__device__ __forceinline__ void copy_rows(Element* destination, int64_t row_stride,
                                          const Tile& tile, int rows, int cols) {
  constexpr int kChunks = Tile::kCols / 8;
  const int thread = opaque(threadIdx.x);
#pragma unroll
  for (int first = 0; first < Tile::kRows * kChunks; first += kThreads) {
    const int row = (first + thread) / kChunks, col = (first + thread) % kChunks * 8;
    if (row < rows && col < cols) {
      const char* source = reinterpret_cast<const char*>(tile.data) + Tile::offset(row, col);
      *reinterpret_cast<uint4*>(destination + row * row_stride + col) =
          *reinterpret_cast<const uint4*>(source);
    }
  }
}

}  // namespace jax_flash::attention::sm80
