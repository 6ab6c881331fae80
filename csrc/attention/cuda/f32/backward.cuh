// The gradients in exact f32, as two kernels without a single atomic: one owns 64 queries and goes
// over the key tiles (dQ, and delta = rowsum(dO * O) - dlse for the other), one owns 64 keys and
// goes over the query tiles of every head of the group (dK, dV). Both recompute
//   P = exp(scale Q K^T - lse),   dS = P * (dropout(dO V^T) - delta).
#pragma once

#include "attention/cuda/f32/tiles.cuh"
#include "attention/cuda/instances.h"

namespace jax_flash::attention::f32 {

// What becomes of one element, whichever axis the CTA owns.
struct Element {
  bool exists, is_kept;

  __device__ float probability(float score, float scale, float lse) const {
    return exists && lse != -INFINITY ? expf(score * scale - lse) : 0.0f;
  }
  __device__ float dropped(float x, float scale) const { return is_kept ? x * scale : 0.0f; }
};

__device__ inline Element element_at(const BackwardParams& p, const Place& place,
                                     const BlockMask& blocks, const Sequence& s, int head, int i,
                                     int j) {
  Element e{element_exists(blocks, s, i, j), true};
  if (p.dropout.threshold > 0 && e.exists) {
    e.is_kept = Dropout(p.dropout, p.num_sequences, place.batch, s, head).keeps(i, j);
  }
  return e;
}

// delta of the call, [batches, heads, seq_q], in the workspace.
inline int64_t backward_workspace_bytes(const BackwardParams& p) {
  return num_batches(p) * p.heads * p.seq_q * int64_t{sizeof(float)};
}
__device__ inline float* delta_pointer(const BackwardParams& p, const Place& place, int head,
                                       int64_t row) {
  return static_cast<float*>(p.workspace) + (place.batch_index * p.heads + head) * p.seq_q + row;
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    backward_query_kernel(const __grid_constant__ BackwardParams p) {
  __shared__ ProductSmem<kHeadDim> smem;
  __shared__ Weights weights;
  __shared__ float lse[kTile], delta[kTile];
  const Place place(p, num_slots(p, p.seq_q, kTile), p.heads);
  const int head = place.head, kv_head = static_cast<int>(head / (p.heads / p.kv_heads));
  const Sequence s = find_sequence(p, place.batch, Axis::kQuery, kTile, place.slot);
  if (s.slot_is_empty(Axis::kQuery)) return;
  const int row = s.first_row;
  const auto query_rows = [&](const ConstTensor& tensor, int64_t cols) {
    return rows_of(tensor, place.batch, s.query_start, row, head, s.query_length, cols);
  };
  const RowsOf q = query_rows(p.q, p.head_dim), o = query_rows(p.o, p.value_dim),
               dout = query_rows(p.dout, p.value_dim);

  // lse and delta of the tile, four threads a row.
  {
    const int i = threadIdx.x / 4;
    float partial = 0.0f;
    for (int col = threadIdx.x % 4 * 4; col < p.value_dim; col += 16) {
      const float4 x = o.at(i, col), y = dout.at(i, col);
      partial += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
    }
    partial = device::quad_sum(partial);
    if (threadIdx.x % 4 == 0) {
      const bool exists = row + i < s.query_length;
      const int64_t array_row = s.query_start + row + i;
      lse[i] = exists ? *row_pointer(p.lse, place.batch, array_row, head) : -INFINITY;
      if (exists && p.dlse.data != nullptr) {
        partial -= *row_pointer(p.dlse, place.batch, array_row, head);
      }
      delta[i] = partial;
      if (exists) *delta_pointer(p, place, head, array_row) = partial;
    }
  }

  const BlockMask blocks(p.mask, place.batch, head);
  const TileRange range = key_tiles<kTile, kTile>(s, row);
  const float keep_scale = dropout_scale(p.dropout);
  Accumulator<kHeadDim> rDQ = {};
  for (int tile = range.begin; tile < range.end; ++tile) {
    const int col = tile * kTile;
    if (!tile_exists(blocks, s, row, col)) continue;
    const auto key_rows = [&](const ConstTensor& tensor, int64_t cols) {
      return rows_of(tensor, place.batch, s.key_start, col, kv_head, s.key_length, cols);
    };
    float rS[4][4], rDP[4][4];
    scores<kHeadDim>(rS, smem, q, key_rows(p.k, p.head_dim), static_cast<int>(p.head_dim));
    scores<kHeadDim>(rDP, smem, dout, key_rows(p.v, p.value_dim), static_cast<int>(p.value_dim));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = own_row() + r;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Element e = element_at(p, place, blocks, s, head, row + i, col + other_row() + c);
        const float probability = e.probability(rS[r][c], p.scale, lse[i]);
        rS[r][c] = probability * (e.dropped(rDP[r][c], keep_scale) - delta[i]);
      }
    }
    // dQ += dS K
    store_weights(weights, rS);
    accumulate<kHeadDim>(rDQ, smem, weights, key_rows(p.k, p.head_dim));
  }
  const float factor[4] = {p.scale, p.scale, p.scale, p.scale};
  store_rows<kHeadDim>(element_pointer<float>(p.dq, place.batch, s.query_start + row, head),
                       p.dq.row_stride, s.query_rows - row, static_cast<int>(p.head_dim), rDQ,
                       factor);
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    backward_key_kernel(const __grid_constant__ BackwardParams p) {
  __shared__ ProductSmem<kHeadDim> smem;
  __shared__ Weights weights;
  const Place place(p, num_slots(p, p.seq_k, kTile), p.kv_heads);
  const int kv_head = place.head, group = static_cast<int>(p.heads / p.kv_heads);
  const Sequence s = find_sequence(p, place.batch, Axis::kKey, kTile, place.slot);
  if (s.slot_is_empty(Axis::kKey)) return;
  const int col = s.first_row;
  const auto key_rows = [&](const ConstTensor& tensor, int64_t cols) {
    return rows_of(tensor, place.batch, s.key_start, col, kv_head, s.key_length, cols);
  };
  const RowsOf k = key_rows(p.k, p.head_dim), v = key_rows(p.v, p.value_dim);
  const TileRange range = query_tiles<kTile, kTile>(s, col);
  const float keep_scale = dropout_scale(p.dropout);

  Accumulator<kHeadDim> rDK = {}, rDV = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const BlockMask blocks(p.mask, place.batch, head);
    for (int tile = range.begin; tile < range.end; ++tile) {
      const int row = tile * kTile;
      if (!tile_exists(blocks, s, row, col)) continue;
      const auto query_rows = [&](const ConstTensor& tensor, int64_t cols) {
        return rows_of(tensor, place.batch, s.query_start, row, head, s.query_length, cols);
      };
      const RowsOf q = query_rows(p.q, p.head_dim), dout = query_rows(p.dout, p.value_dim);
      float rS[4][4], rDP[4][4];  // [key][query]
      scores<kHeadDim>(rS, smem, k, q, static_cast<int>(p.head_dim));
      scores<kHeadDim>(rDP, smem, v, dout, static_cast<int>(p.value_dim));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int i = row + other_row() + c;
        float lse = -INFINITY, delta = 0.0f;
        if (i < s.query_length) {
          lse = *row_pointer(p.lse, place.batch, s.query_start + i, head);
          delta = *delta_pointer(p, place, head, s.query_start + i);
        }
        float kept[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const Element e = element_at(p, place, blocks, s, head, i, col + own_row() + r);
          const float probability = e.probability(rS[r][c], p.scale, lse);
          kept[r] = e.dropped(probability, keep_scale);
          rS[r][c] = probability * (e.dropped(rDP[r][c], keep_scale) - delta);
        }
        store_weights_row(weights, c, kept[0], kept[1], kept[2], kept[3]);
      }
      // dV += P^T dO
      accumulate<kHeadDim>(rDV, smem, weights, dout);
      __syncthreads();  // Everyone has read P.
      // dK += dS^T Q
      store_weights(weights, rS);
      accumulate<kHeadDim>(rDK, smem, weights, q);
    }
  }
  const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f}, scale[4] = {p.scale, p.scale, p.scale, p.scale};
  store_rows<kHeadDim>(element_pointer<float>(p.dk, place.batch, s.key_start + col, kv_head),
                       p.dk.row_stride, s.key_rows - col, static_cast<int>(p.head_dim), rDK, scale);
  store_rows<kHeadDim>(element_pointer<float>(p.dv, place.batch, s.key_start + col, kv_head),
                       p.dv.row_stride, s.key_rows - col, static_cast<int>(p.value_dim), rDV, one);
}

template <int kHeadDim>
const char* launch_backward(const BackwardParams& p, cudaStream_t stream) {
  if (backward_workspace_bytes(p) > p.workspace_bytes) {
    return "jax_flash: workspace: smaller than the CUDA backward needs";
  }
  const int64_t query_ctas = num_batches(p) * p.heads * num_slots(p, p.seq_q, kTile);
  const int64_t key_ctas = num_batches(p) * p.kv_heads * num_slots(p, p.seq_k, kTile);
  if (query_ctas > INT32_MAX || key_ctas > INT32_MAX) {
    return "jax_flash: expected fewer than 2^31 tiles in the grid";
  }
  backward_query_kernel<kHeadDim><<<static_cast<unsigned>(query_ctas), kThreads, 0, stream>>>(p);
  backward_key_kernel<kHeadDim><<<static_cast<unsigned>(key_ctas), kThreads, 0, stream>>>(p);
  return launch_status();
}

}  // namespace jax_flash::attention::f32
