// What the Hopper backward kernels share.
#pragma once

#include "attention/cuda/sm90/backward_arguments.h"
#include "attention/cuda/sm90/pipeline.cuh"
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

// Where a step's dQ is added, and, where that happens in a fixed order, after how many other key
// tiles: `additions` counts those that were, for each of two parts of the tile.
struct DqTarget {
  float* sum;
  int* additions;
  int turn;

  // Until it is our turn.
  __device__ __forceinline__ void wait(int part) const {
    while (ptx::load_acquire(additions + part) != turn) {
    }
    ptx::fence_async_global();
  }
  // Our addition has been performed: the next, please.
  __device__ __forceinline__ void tell(int part) const {
    __threadfence();  // The addition comes before the count.
    atomicAdd(additions + part, 1);
  }
};

// Of the query tile at `row` of the place's sequence, number `sum` of all. The order is that of the
// list: the last key tiles first (find_place).
template <class Traits>
__device__ __forceinline__ DqTarget find_target(const BackwardArguments& a,
                                                const KeyTilePlace& place, int sum, int row) {
  const Sequence& s = place.sequence;
  DqTarget target{a.plan.dq_sum + int64_t{sum} * (Traits::kBlockM * Traits::kHeadDim),
                  a.additions + 2 * sum, 0};
  if (a.p.deterministic) {
    const int last_row = min(row + Traits::kBlockM, s.query_length) - 1;
    const int last_key = min(last_row + s.right, s.key_length - 1);
    target.turn = last_key / Traits::kBlockN - s.first_row / Traits::kBlockN;
  }
  return target;
}

// Starts the copies of a tile [kRows][kCols], from dim `first_col` on.
template <typename Tile>
__device__ __forceinline__ void load_tile(Tile& tile, const OperandMap& operand,
                                          const BatchIndex& batch, int head, int row,
                                          ptx::Mbarrier& barrier, ptx::L2Hint hint,
                                          int first_col = 0) {
  const int entry = operand.batch(batch.axis);
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    ptx::tma_load(reinterpret_cast<char*>(tile.data) + slab * Tile::kSlabBytes, operand.map,
                  barrier, first_col + 64 * slab, row, head, entry, hint);
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

// One arrival of the warp: for what only wgmma and the copy engine read (else release_read).
__device__ __forceinline__ void release(ptx::Mbarrier& barrier) {
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

}  // namespace jax_flash::attention::sm90
