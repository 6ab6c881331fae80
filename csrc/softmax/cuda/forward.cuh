// P = softmax(scale * S over what a row sees). Rows that fit stay in registers between the maximum,
// the sum and the result, so that memory is passed once; longer ones are read twice, the second
// time from L2. docs/kernels/softmax.md has the budget and the figures.
#pragma once

#include <cfloat>

#include "device/batch.cuh"
#include "ptx/sm80.cuh"
#include "softmax/cuda/row.cuh"
#include "softmax/cuda/team.cuh"

namespace jax_flash::softmax {

inline constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exponential(float x) { return ptx::exp2_approx(x * kLog2e); }

// The mask's row, or null.
__device__ __forceinline__ const uint8_t* mask_row(const ForwardParams& p, const Place& place) {
  if (p.mask.data == nullptr) return nullptr;
  return device::BatchIndex(p, place.entry).of(p.mask) + place.row * p.mask_row_stride;
}

// Rows of up to kThreads * kVectors vectors.
template <typename Element, int kThreads, int kVectors>
__global__ void __launch_bounds__(Team<kThreads>::kBlock, Team<kThreads>::kBlocks)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  using T = Team<kThreads>;
  using R = Row<Element>;
  constexpr int kSize = R::kSize;
  __shared__ float tops[T::kWarps], totals[T::kWarps];

  const int64_t flat = int64_t{blockIdx.x} * T::kRows + threadIdx.x / kThreads;
  const bool is_row = flat < p.rows;  // the others follow, for the shuffles
  const Place place(p, is_row ? flat : 0);
  R row(p, is_row ? flat : 0, place.row);
  if (!is_row) row.columns = row.visible = 0;
  const uint8_t* mask = mask_row(p, place);
  const int first = row.column(threadIdx.x % kThreads);
  constexpr int kStep = kThreads * kSize;  // columns from one vector of a thread to its next

  // All loads before the first use.
  typename R::Chunk x[kVectors];
  Hidden<kSize> hidden[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = first + v * kStep;
    x[v] = row.load(static_cast<const Element*>(p.scores), column);
    if (column < row.visible) hidden[v] = Hidden<kSize>::of(mask, column, row.visible);
  }

  float s[kVectors][kSize], top = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (first + v * kStep >= row.visible) break;
    x[v].widen(s[v]);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      s[v][i] = hidden[v][i] ? -INFINITY : s[v][i] * p.scale;
      top = fmaxf(top, s[v][i]);
    }
  }
  top = T::template reduce<Max>(top, tops);
  if (top == -INFINITY) top = 0.0f;  // nothing seen: exponentials of -inf

  float total = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (first + v * kStep >= row.visible) break;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      s[v][i] = exponential(s[v][i] - top);
      total += s[v][i];
    }
  }
  total = T::template reduce<Sum>(total, totals);
  const float inverse = total == 0.0f ? 1.0f : 1.0f / total;

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = first + v * kStep;
    if (column >= row.columns) break;
    typename R::Chunk out;
    if (column < row.visible) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {  // 0 also where `inverse` is NaN
        s[v][i] = hidden[v][i] ? 0.0f : s[v][i] * inverse;
      }
      out = R::Chunk::narrow(s[v]);
    }
    row.store(static_cast<Element*>(p.probs), column, out);
  }
}

// Rows of any length: a block each. A thread's sum is relative to the largest score that it has
// seen, but finite: +inf then makes the sum infinite.
template <typename Element, int kThreads, int kUnroll>
__global__ void __launch_bounds__(kThreads, Team<kThreads>::kBlocks)
    long_forward_kernel(const __grid_constant__ ForwardParams p) {
  using T = Team<kThreads>;
  using R = Row<Element>;
  constexpr int kSize = R::kSize, kStep = kThreads * kSize;
  __shared__ float tops[T::kWarps], totals[T::kWarps];

  const Place place(p, blockIdx.x);
  const R row(p, blockIdx.x, place.row);
  const uint8_t* mask = mask_row(p, place);
  const Element* scores = static_cast<const Element*>(p.scores);

  float top = -FLT_MAX, total = 0.0f;
  for (int first = row.column(threadIdx.x); first < row.visible; first += kUnroll * kStep) {
    typename R::Chunk x[kUnroll];
    Hidden<kSize> hidden[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int column = first + u * kStep;
      x[u] = row.load(scores, column);
      if (column < row.visible) hidden[u] = Hidden<kSize>::of(mask, column, row.visible);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kStep >= row.visible) break;
      float s[kSize], largest = top;
      x[u].widen(s);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        s[i] = hidden[u][i] ? -INFINITY : s[i] * p.scale;
        largest = fmaxf(largest, s[i]);
      }
      largest = fminf(largest, FLT_MAX);
      total *= exponential(top - largest);
      top = largest;
#pragma unroll
      for (int i = 0; i < kSize; ++i) total += exponential(s[i] - top);
    }
  }
  const float own = top;
  top = T::template reduce<Max>(own, tops);
  total = T::template reduce<Sum>(total * exponential(own - top), totals);
  const float inverse = total == 0.0f ? 1.0f : total == INFINITY ? NAN : 1.0f / total;

  for (int first = row.column(threadIdx.x); first < row.columns; first += kUnroll * kStep) {
    typename R::Chunk x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) x[u] = row.load(scores, first + u * kStep);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int column = first + u * kStep;
      if (column >= row.columns) break;
      typename R::Chunk out;
      if (column < row.visible) {
        const auto hidden = Hidden<kSize>::of(mask, column, row.visible);
        float s[kSize];
        x[u].widen(s);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          s[i] = hidden[i] ? 0.0f : exponential(s[i] * p.scale - top) * inverse;
        }
        out = R::Chunk::narrow(s);
      }
      row.store(static_cast<Element*>(p.probs), column, out);
    }
  }
}

}  // namespace jax_flash::softmax
