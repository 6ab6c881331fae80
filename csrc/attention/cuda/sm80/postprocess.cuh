// After the backward: adds up the f32 sums of dQ (or, with several key splits, of dK and dV) in a
// fixed order, scales them and writes them as 16-bit rows. One CTA serves one tile of one head.
#pragma once

#include "attention/cuda/seqlen.cuh"
#include "attention/cuda/sm80/tile_copy.cuh"
#include "attention/cuda/sm80/warp_product.cuh"

namespace jax_flash::attention::sm80 {

struct PostprocessArguments {
  Problem p;
  Tensor out;        // [batch, rows, heads, dim]
  const float* sum;  // [buffers][batches, heads, slots, register, thread]
  int64_t buffers, buffer_stride;
  int64_t slots, heads;
  int dim;
  float scale;
};

// `Warps` is the grid in which the backward kernel's warps held the tile.
template <typename Element, class Warps, typename Tile, int kThreads, Axis kAxis>
__global__ void __launch_bounds__(kThreads)
    postprocess_kernel(const __grid_constant__ PostprocessArguments a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  Tile& tile = *reinterpret_cast<Tile*>(shared);
  const int slot = static_cast<int>(blockIdx.x % a.slots);
  const int head = static_cast<int>(blockIdx.x / a.slots % a.heads);
  const BatchIndex batch(a.p, blockIdx.x / a.slots / a.heads);
  const Sequence s = find_sequence(a.p, batch, kAxis, Tile::kRows, slot);
  if (s.slot_is_empty(kAxis)) return;

  typename Warps::Accumulator rD = {};
  const float* sum = a.sum + int64_t{blockIdx.x} * (Tile::kRows * Tile::kCols) + threadIdx.x;
  for (int64_t buffer = 0; buffer < a.buffers; ++buffer, sum += a.buffer_stride) {
#pragma unroll
    for (int i = 0; i < Warps::kSize; ++i) (&rD[0][0][0])[i] += sum[i * kThreads];
  }
  store_accumulator<Element, Warps>(tile, rD, a.scale);
  __syncthreads();  // The tile is written before other threads copy it.
  const int first_row = (kAxis == Axis::kQuery ? s.query_start : s.key_start) + s.first_row;
  const int rows = (kAxis == Axis::kQuery ? s.query_rows : s.key_rows) - s.first_row;
  copy_rows<kThreads>(element_pointer<Element>(a.out, batch, first_row, head), a.out.row_stride,
                      tile, rows, a.dim);
}

}  // namespace jax_flash::attention::sm80
