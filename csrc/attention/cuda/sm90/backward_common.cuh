// What the Hopper backward kernels share.
#pragma once

#include "attention/cuda/sm90/backward_arguments.h"
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"

namespace jax_flash::attention::sm90 {

// A place in the ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Starts the copies of a [kRows][kHeadDim] tile.
template <typename Tile>
__device__ __forceinline__ void load_tile(Tile& tile, const OperandMap& operand,
                                          const BatchIndex& batch, int head, int row,
                                          ptx::Mbarrier& barrier, ptx::L2Hint hint) {
  const int entry = operand.batch(batch.axis);
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    ptx::tma_load(reinterpret_cast<char*>(tile.data) + slab * Tile::kSlabBytes, operand.map,
                  barrier, 64 * slab, row, head, entry, hint);
  }
}

// Zeroes the rows of a tile from `rows` on: what the copy engine found there belongs to others.
template <int kThreads, typename Tile>
__device__ __forceinline__ void zero_rows(Tile& tile, int rows) {
  const int chunks = (Tile::kRows - rows) * (Tile::kCols / 8);
  for (int i = threadIdx.x % kThreads; i < chunks; i += kThreads) {
    const uint32_t offset = Tile::offset(rows + i / (Tile::kCols / 8), i % (Tile::kCols / 8) * 8);
    *reinterpret_cast<uint4*>(reinterpret_cast<char*>(tile.data) + offset) = uint4{};
  }
}

// One arrival of the warp.
__device__ __forceinline__ void release(ptx::Mbarrier& barrier) {
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

}  // namespace jax_flash::attention::sm90
