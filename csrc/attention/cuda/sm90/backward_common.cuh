// What the Hopper backward kernels share.
#pragma once

#include "attention/cuda/sm90/backward_arguments.h"
#include "device/element.cuh"
#include "device/opaque.cuh"
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

// Writes a warpgroup's accumulators of 64 rows x 64 dims, times `scale`, as the first `rows` x
// `cols` at `destination`.
template <typename Element>
__device__ __forceinline__ void store_block(const float (&rD)[8][4], float scale,
                                            Element* destination, int64_t row_stride, int rows,
                                            int cols) {
  const int thread = threadIdx.x % 128, lane = thread % 32, quad_lane = lane % 4;
  uint32_t pairs[2][8];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pairs[half][n] = device::pack<Element>(rD[n][2 * half] * scale, rD[n][2 * half + 1] * scale);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = thread / 32 * 16 + lane / 4 + 8 * half;
    // Lane q of a quad holds columns 8 n + 2 q and + 1 of each n; it leaves with columns 8 q to
    // 8 q + 7, and 32 more. In turn t it hands lane q ^ t the pair of that lane's columns.
#pragma unroll
    for (int group = 0; group < 8; group += 4) {
      uint32_t words[4];
#pragma unroll
      for (int turn = 0; turn < 4; ++turn) {
        const int chunk = quad_lane ^ turn;
        const uint32_t out = chunk == 0   ? pairs[half][group]
                             : chunk == 1 ? pairs[half][group + 1]
                             : chunk == 2 ? pairs[half][group + 2]
                                          : pairs[half][group + 3];
        const uint32_t in = __shfl_xor_sync(device::kWarp, out, turn);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          if (q == chunk) words[q] = in;
        }
      }
      const int col = 8 * (group + quad_lane);
      if (row < rows && col < cols) {
        *reinterpret_cast<uint4*>(destination + row * row_stride + col) = {words[0], words[1],
                                                                           words[2], words[3]};
      }
    }
  }
}

// Writes a warpgroup's accumulators of 64 rows x 64 dims, times `scale`, as the first `rows` x
// `cols` at `destination`.
template <typename Element>
__device__ __forceinline__ void store_block_words(const float (&rD)[8][4], float scale,
                                                  Element* destination, int64_t row_stride,
                                                  int rows, int cols) {
  const int thread = device::thread_index() % 128, first_row = thread / 32 * 16 + thread % 32 / 4;
  const int first_col = 2 * (thread % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half;
    if (row >= rows) continue;
    Element* const out = destination + row * row_stride + first_col;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (8 * n < cols) {
        *reinterpret_cast<uint32_t*>(out + 8 * n) =
            device::pack<Element>(rD[n][2 * half] * scale, rD[n][2 * half + 1] * scale);
      }
    }
  }
}

// One arrival of the warp.
__device__ __forceinline__ void release(ptx::Mbarrier& barrier) {
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

}  // namespace jax_flash::attention::sm90
