// O = dropout(softmax(scale Q K^T)) V and lse in exact f32. One CTA owns 64 queries of one head and
// goes over the key tiles with the online softmax: the simplest right kernel, after which the fast
// ones are checked.
#pragma once

#include "attention/cuda/f32/tiles.cuh"
#include "attention/cuda/instances.h"

namespace jax_flash::attention::f32 {

// Across the 16 threads that share a row.
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(device::kWarp, x, step));
  return x;
}
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(device::kWarp, x, step);
  return x;
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  __shared__ ProductSmem<kHeadDim> smem;
  __shared__ Weights weights;
  const Place place(p, num_slots(p, p.seq_q, kTile), p.heads);
  const int head = place.head, kv_head = static_cast<int>(head / (p.heads / p.kv_heads));
  const Sequence s = find_sequence(p, place.batch, Axis::kQuery, kTile, place.slot);
  if (s.slot_is_empty(Axis::kQuery)) return;
  const int row = s.first_row;
  const BlockMask blocks(p.mask, place.batch, head);
  const TileRange range = key_tiles<kTile, kTile>(s, row);
  const RowsOf q = rows_of(p.q, place.batch, s.query_start, row, head, s.query_length, p.head_dim);

  Accumulator<kHeadDim> rO = {};
  float maximum[4], sum[4] = {};
#pragma unroll
  for (float& m : maximum) m = -INFINITY;
  for (int tile = range.begin; tile < range.end; ++tile) {
    const int col = tile * kTile;
    if (!tile_exists(blocks, s, row, col)) continue;
    // S = scale Q K^T
    float rS[4][4];
    scores<kHeadDim>(rS, smem, q,
                     rows_of(p.k, place.batch, s.key_start, col, kv_head, s.key_length, p.head_dim),
                     static_cast<int>(p.head_dim));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      // The new maximum, and what it makes of the sums so far. A row that has seen no key yet keeps
      // 0 as its reference, so that exp(-inf - reference) is 0.
      float tile_max = -INFINITY;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool exists = element_exists(blocks, s, row + own_row() + r, col + other_row() + c);
        rS[r][c] = exists ? rS[r][c] * p.scale : -INFINITY;
        tile_max = fmaxf(tile_max, rS[r][c]);
      }
      const float new_max = fmaxf(maximum[r], row_max(tile_max));
      const float reference = new_max == -INFINITY ? 0.0f : new_max;
      const float rescale = expf(maximum[r] - reference);
      maximum[r] = new_max;
      float tile_sum = 0.0f;
#pragma unroll
      for (int c = 0; c < 4; ++c) tile_sum += rS[r][c] = expf(rS[r][c] - reference);
      sum[r] = sum[r] * rescale + row_sum(tile_sum);
#pragma unroll
      for (int n = 0; n < kHeadDim / 64; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) rO[n][r][c] *= rescale;
      }
    }
    if (p.dropout.threshold > 0) {
      const Dropout dropout(p.dropout, p.num_sequences, place.batch, s, head);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (!dropout.keeps(row + own_row() + i / 4, col + other_row() + i % 4)) {
          rS[i / 4][i % 4] = 0.0f;
        }
      }
    }
    // O += P V
    store_weights(weights, rS);
    accumulate<kHeadDim>(
        rO, smem, weights,
        rows_of(p.v, place.batch, s.key_start, col, kv_head, s.key_length, p.value_dim));
  }

  float factor[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    factor[r] = sum[r] == 0.0f ? 0.0f : dropout_scale(p.dropout) / sum[r];
    const int i = row + own_row() + r;
    if (threadIdx.x % 16 == 0 && i < s.query_rows) {
      *row_pointer(p.lse, place.batch, s.query_start + i, head) =
          sum[r] == 0.0f ? -INFINITY : maximum[r] + logf(sum[r]);
    }
  }
  store_rows<kHeadDim>(element_pointer<float>(p.o, place.batch, s.query_start + row, head),
                       p.o.row_stride, s.query_rows - row, static_cast<int>(p.value_dim), rO,
                       factor);
}

template <int kHeadDim>
const char* launch_forward(const ForwardParams& p, cudaStream_t stream) {
  const int64_t ctas = num_batches(p) * p.heads * num_slots(p, p.seq_q, kTile);
  if (ctas > INT32_MAX) return "jax_flash: expected fewer than 2^31 tiles in the grid";
  forward_kernel<kHeadDim><<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(p);
  return launch_status();
}

}  // namespace jax_flash::attention::f32
