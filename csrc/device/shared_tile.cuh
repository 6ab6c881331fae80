// A tile [kRows][kCols] of 16-bit elements in shared memory, kept as slabs of 64 columns (32 where
// kCols is no multiple of 64), each slab's rows contiguous: 128 (64) bytes. The 16-byte chunks of a
// row are permuted by an XOR with the row, so that the eight rows that one ldmatrix matrix or one
// quarter-warp store touches lie in all 32 banks.
#pragma once

#include "ptx/sm80.cuh"

namespace jax_flash::device {

template <int kRows_, int kCols_>
struct alignas(1024) SharedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kSlabCols = kCols % 64 == 0 ? 64 : 32;
  static constexpr int kSlabs = kCols / kSlabCols;
  static constexpr int kRowBytes = kSlabCols * 2;
  static constexpr int kSlabBytes = kRows * kRowBytes;
  static constexpr int kChunks = kSlabCols / 8;  // 16-byte chunks of a row of a slab
  static_assert(kCols % 32 == 0 && kRows % 8 == 0);

  uint16_t data[kRows * kCols];

  // Byte offset of the 16-byte chunk that holds (row, col).
  __device__ static uint32_t offset(int row, int col) {
    const int slab = col / kSlabCols, chunk = col % kSlabCols / 8;
    const int twist = kSlabCols == 64 ? row % 8 : row / 2 % 4;
    return slab * kSlabBytes + row * kRowBytes + (chunk ^ twist) * 16;
  }
};

// Where this lane's ldmatrix row lies, for 16x16 blocks at (first_row + row, col), all multiples
// of 16. The swizzle of a lane does not change from block to block, so a block costs one XOR.
template <typename Tile>
class LdmatrixAddress {
 public:
  // kRowsFirst: matrices 0..3 are (rows 0-7, 8-15, 0-7, 8-15) x (columns 0-7, 0-7, 8-15, 8-15):
  //             operand A from [m][k], and operand B from [k][n] with .trans
  // kColsFirst: matrices 0..3 are (rows 0-7, 0-7, 8-15, 8-15) x (columns 0-7, 8-15, 0-7, 8-15):
  //             operand B from [n][k]
  enum class Order { kRowsFirst, kColsFirst };

  __device__ LdmatrixAddress(const Tile& tile, Order order, int first_row = 0,
                             int lane = threadIdx.x % 32) {
    const int inner = lane / 8 % 2, outer = lane / 16;
    const int row = lane % 8 + 8 * (order == Order::kRowsFirst ? inner : outer);
    const int col = 8 * (order == Order::kRowsFirst ? outer : inner);
    lane_address_ = ptx::shared_address(&tile) + Tile::offset(first_row + row, col);
  }

  __device__ __forceinline__ uint32_t operator()(int row, int col, uint32_t tile_offset = 0) const {
    return (lane_address_ ^ (col % Tile::kSlabCols * 2)) +
           col / Tile::kSlabCols * Tile::kSlabBytes + row * Tile::kRowBytes + tile_offset;
  }

 private:
  uint32_t lane_address_;
};

// Copies rows [row, row + kRows) of a [rows, >= cols] matrix in global memory into the tile with
// cp.async; whatever lies beyond `rows` or `cols` becomes zero. The caller commits and waits.
template <typename Tile, int kThreads>
class TileLoader {
 public:
  static constexpr int kRowStep = kThreads / Tile::kChunks;  // rows that the CTA copies at once
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowStep == 0 && kRowStep % 8 == 0);

  __device__ TileLoader(const void* base, int64_t row_stride, int rows, int cols)
      : row_(threadIdx.x / Tile::kChunks),
        rows_(rows),
        cols_(cols),
        col_(threadIdx.x % Tile::kChunks * 8),
        row_bytes_(row_stride * 2),
        source_(static_cast<const char*>(base) + row_ * row_bytes_ + col_ * 2) {}

  __device__ __forceinline__ void operator()(Tile& tile, int row) const {
    const uint32_t destination = ptx::shared_address(&tile) + Tile::offset(row_, col_);
    const char* source = source_ + row * row_bytes_;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kRowStep; ++i) {
      const bool row_exists = row + row_ + i * kRowStep < rows_;
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        const bool exists = row_exists && col_ + slab * Tile::kSlabCols < cols_;
        ptx::cp_async_16(destination + slab * Tile::kSlabBytes + i * kRowStep * Tile::kRowBytes,
                         source + i * kRowStep * row_bytes_ + slab * Tile::kRowBytes,
                         exists ? 16 : 0);
      }
    }
  }

 private:
  int row_, rows_, cols_, col_;
  int64_t row_bytes_;
  const char* source_;
};

}  // namespace jax_flash::device
