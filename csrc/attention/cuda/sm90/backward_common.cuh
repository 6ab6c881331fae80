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

// Where a step's dQ is added, a part of the tile at a time, and when: as soon as `state` has
// reached `turn`, or at once by whoever claims the first addition (DqOrder).
struct DqTarget {
  float* sum;
  int* state;  // of each of two parts
  int turn;
  bool is_last;  // of the key tile: what the ring has next may not be there yet

  // What was found: where it is 0 the first addition is ours.
  __device__ __forceinline__ int claim(int part) const {
    return ptx::compare_and_swap_acquire(state + part, 0, 1);
  }
  __device__ __forceinline__ int look(int part) const { return ptx::load_acquire(state + part); }
  // Our addition has been performed: the next, please.
  __device__ __forceinline__ void tell(int part) const {
    __threadfence();  // The addition comes before the word.
    atomicAdd(state + part, 1);
  }
};

// The first key tile that sees the query tile at `row`, if any does.
template <class Traits>
__device__ __forceinline__ int first_key_tile(const Sequence& s, int row) {
  return max(row + s.left, 0) / Traits::kBlockN;
}
// Does any, by the ranges of the key tiles' own steps?
template <class Traits>
__device__ __forceinline__ bool sees_key_tile(const Sequence& s, int row) {
  const int first_key = first_key_tile<Traits>(s, row) * Traits::kBlockN;
  const TileRange range = query_tiles<Traits::kBlockM, Traits::kBlockN>(s, first_key);
  return range.begin <= row / Traits::kBlockM && row / Traits::kBlockM < range.end;
}

// Of the query tile at `row` of the place's sequence, number `sum` of all.
template <class Traits>
__device__ __forceinline__ DqTarget find_target(const BackwardArguments& a,
                                                const KeyTilePlace& place, int sum, int row,
                                                bool is_last) {
  const Sequence& s = place.sequence;
  int turn = a.dq_order == DqOrder::kAny ? 0 : 2;
  if (a.dq_order == DqOrder::kFixed) {
    turn = s.first_row / Traits::kBlockN - first_key_tile<Traits>(s, row);
  }
  return {a.plan.dq_sum + int64_t{sum} * (Traits::kBlockM * Traits::kHeadDim),
          a.dq_states + 2 * sum, turn, is_last};
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
