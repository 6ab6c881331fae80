// Tiles between tensors and shared memory, and accumulators into shared tiles.
#pragma once

#include "device/element.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::attention::sm80 {

// Hides where a value came from, so that the compiler does not compute what follows from it ahead of
// the loop and then spill it.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

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

// Writes this warp's part of a WarpGrid into the tile; value(m, n, e) gives the accumulator's
// elements.
template <typename Element, class Warps, typename Tile, typename Value>
__device__ __forceinline__ void store_accumulator(Tile& tile, const Value& value) {
  const int lane = opaque(threadIdx.x) % 32;
  char* data = reinterpret_cast<char*>(tile.data);
  const uint32_t origin =
      Tile::offset(Warps::row() + lane / 4, Warps::col()) + lane % 4 * 4;
#pragma unroll
  for (int m = 0; m < Warps::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Warps::kN; ++n) {
      // The warp's columns begin at a multiple of their number, a power of two: no carry.
      const uint32_t offset = (origin ^ n % 8 * 16) + n / 8 * Tile::kSlabBytes + 16 * m * Tile::kRowBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<uint32_t*>(data + offset + half * 8 * Tile::kRowBytes) =
            device::pack<Element>(value(m, n, 2 * half), value(m, n, 2 * half + 1));
      }
    }
  }
}

// Copies rows [0, rows) and columns [0, cols) of the tile to `destination`, 16 bytes a thread.
template <int kThreads, typename Element, typename Tile>
__device__ __forceinline__ void copy_rows(Element* destination, int64_t row_stride, const Tile& tile,
                                          int rows, int cols) {
  constexpr int kChunks = Tile::kCols / 8;
#pragma unroll
  for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, col = i % kChunks * 8;
    if (row < rows && col < cols) {
      const char* source = reinterpret_cast<const char*>(tile.data) + Tile::offset(row, col);
      *reinterpret_cast<uint4*>(destination + row * row_stride + col) =
          *reinterpret_cast<const uint4*>(source);
    }
  }
}

}  // namespace jax_flash::attention::sm80
