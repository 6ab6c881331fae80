// The two matrix products of attention in exact f32 (FFMA), for a CTA of 256 threads on tiles of 64
// rows. Forward and backward differ only in which axis a CTA owns: it keeps 64 of its own rows
// (queries or keys), and 64 rows of the other axis pass by.
#pragma once

#include <cstdint>

#include "device/opaque.cuh"

namespace jax_flash::attention::f32 {

inline constexpr int kTile = 64;       // own rows, and rows of the other axis in a step
inline constexpr int kThreads = 256;   // 16 x 16, each with 4 x 4 elements of a [64][64] matrix
inline constexpr int kDepth = 32;      // columns of a chunk of scores()
inline constexpr int kChunkRows = 16;  // rows of a chunk of accumulate()

// Rows of a matrix in global memory: those past `rows` and columns past `cols` count as zero.
struct RowsOf {
  const float* data;
  int64_t row_stride;
  int rows, cols;

  __device__ float4 at(int row, int col) const {
    if (row >= rows || col >= cols) return {};
    return *reinterpret_cast<const float4*>(data + row * row_stride + col);
  }
};

using Weights = float[kTile][kTile + 4];  // [other][own]

template <int kHeadDim>
union ProductSmem {
  struct {
    float own[kDepth][kTile + 4], other[kDepth][kTile + 4];  // transposed chunks
  } scores;
  float other[kChunkRows][kHeadDim];
};

__device__ __forceinline__ int own_row() { return device::opaque(threadIdx.x) / 16 * 4; }
__device__ __forceinline__ int other_row() { return device::opaque(threadIdx.x) % 16 * 4; }

__device__ __forceinline__ void multiply_add(float (&d)[4][4], const float4& a, const float4& b) {
  const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) d[r][c] = fmaf(as[r], bs[c], d[r][c]);
  }
}

// rS[r][c] = sum over d < depth of own[own_row() + r][d] * other[other_row() + c][d].
template <int kHeadDim>
__device__ __forceinline__ void scores(float (&rS)[4][4], ProductSmem<kHeadDim>& smem,
                                       const RowsOf& own, const RowsOf& other, int depth) {
#pragma unroll
  for (int i = 0; i < 16; ++i) rS[i / 4][i % 4] = 0.0f;
  for (int first = 0; first < depth; first += kDepth) {
    __syncthreads();  // The previous chunk has been read.
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kDepth / 4; i += kThreads) {
      const int row = i / (kDepth / 4), col = i % (kDepth / 4) * 4;
      const float4 x = own.at(row, first + col), y = other.at(row, first + col);
      const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        smem.scores.own[col + k][row] = xs[k];
        smem.scores.other[col + k][row] = ys[k];
      }
    }
    __syncthreads();  // The chunk is written.
#pragma unroll(kHeadDim > 128 ? 2 : 8)
    for (int d = 0; d < kDepth; ++d) {
      multiply_add(rS, *reinterpret_cast<const float4*>(&smem.scores.own[d][own_row()]),
                   *reinterpret_cast<const float4*>(&smem.scores.other[d][other_row()]));
    }
  }
}

// An accumulator [64 own rows][kHeadDim]: rO[n][r][c] is element (own_row() + r, 64 n + other_row()
// + c).
template <int kHeadDim>
using Accumulator = float[kHeadDim / 64][4][4];

// rO[own][col] += sum over 64 rows o of weights[o][own] * other[o][col]. The barrier between
// writing the weights and reading them is in here.
template <int kHeadDim>
__device__ __forceinline__ void accumulate(Accumulator<kHeadDim>& rO, ProductSmem<kHeadDim>& smem,
                                           const Weights& weights, const RowsOf& other) {
  for (int first = 0; first < kTile; first += kChunkRows) {
    __syncthreads();  // The previous chunk has been read; the weights are written.
#pragma unroll
    for (int i = threadIdx.x; i < kChunkRows * kHeadDim / 4; i += kThreads) {
      const int row = i / (kHeadDim / 4), col = i % (kHeadDim / 4) * 4;
      *reinterpret_cast<float4*>(&smem.other[row][col]) = other.at(first + row, col);
    }
    __syncthreads();  // The chunk is written.
#pragma unroll(kHeadDim > 128 ? 1 : 4)
    for (int o = 0; o < kChunkRows; ++o) {
      const float4 weight = *reinterpret_cast<const float4*>(&weights[first + o][own_row()]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 64; ++n) {
        multiply_add(rO[n], weight,
                     *reinterpret_cast<const float4*>(&smem.other[o][64 * n + other_row()]));
      }
    }
  }
}

// Hands the weights of a step to accumulate(); `c` counts from other_row().
__device__ __forceinline__ void store_weights_row(Weights& weights, int c, float w0, float w1,
                                                  float w2, float w3) {
  *reinterpret_cast<float4*>(&weights[other_row() + c][own_row()]) = float4{w0, w1, w2, w3};
}
__device__ __forceinline__ void store_weights(Weights& weights, const float (&rW)[4][4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    store_weights_row(weights, c, rW[0][c], rW[1][c], rW[2][c], rW[3][c]);
  }
}

// Writes factor[r] * rO to rows [0, rows) and columns [0, cols) of `data`.
template <int kHeadDim>
__device__ __forceinline__ void store_rows(float* data, int64_t row_stride, int rows, int cols,
                                           const Accumulator<kHeadDim>& rO,
                                           const float (&factor)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = own_row() + r;
    if (row >= rows) break;
#pragma unroll
    for (int n = 0; n < kHeadDim / 64; ++n) {
      const int col = 64 * n + other_row();
      if (col >= cols) break;
      *reinterpret_cast<float4*>(data + row * row_stride + col) =
          float4{rO[n][r][0] * factor[r], rO[n][r][1] * factor[r], rO[n][r][2] * factor[r],
                 rO[n][r][3] * factor[r]};
    }
  }
}

}  // namespace jax_flash::attention::f32
