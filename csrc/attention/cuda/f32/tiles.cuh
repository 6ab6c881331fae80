// What the f32 kernels share beside the products: the tiles that a CTA visits and the elements that
// exist in them.
#pragma once

#include "attention/cuda/blocks.cuh"
#include "attention/cuda/dropout.cuh"
#include "attention/cuda/f32/products.cuh"
#include "attention/cuda/seqlen.cuh"

namespace jax_flash::attention::f32 {

// Rows `first`.. of one head of a tensor, up to `rows` of them.
template <typename Void>
__device__ RowsOf rows_of(const View<Void>& tensor, const BatchIndex& batch, int64_t start,
                          int64_t first, int64_t head, int rows, int64_t cols) {
  return {element_pointer<float>(tensor, batch, start + first, head), tensor.row_stride,
          rows - static_cast<int>(first), static_cast<int>(cols)};
}

// Where a CTA works: [batches, heads, slots] in blockIdx.x.
struct Place {
  int slot, head;
  BatchIndex batch;
  int64_t batch_index;

  __device__ Place(const Problem& p, int64_t slots, int64_t heads)
      : slot(static_cast<int>(blockIdx.x % slots)),
        head(static_cast<int>(blockIdx.x / slots % heads)),
        batch(p, blockIdx.x / slots / heads),
        batch_index(blockIdx.x / slots / heads) {}
};

// Is any element of the tile of queries [row, + 64) and keys [col, + 64) allowed by the block mask?
__device__ inline bool tile_exists(const BlockMask& blocks, const Sequence& s, int row, int col) {
  if (blocks.data == nullptr) return true;
  bool any, all;
  blocks.classify(row, min(row + kTile, s.query_length), col, min(col + kTile, s.key_length), any,
                  all);
  return any;
}

__device__ inline bool element_exists(const BlockMask& blocks, const Sequence& s, int i, int j) {
  return s.allows(i, j) && blocks.allows(i, j);
}

}  // namespace jax_flash::attention::f32
