// P = softmax(scale * S over what a row sees). Rows that fit stay in registers between the maximum,
// the sum and the result, so that memory is passed once; longer ones are read twice, the second
// time from L2. docs/kernels/softmax.md has the budget and the figures.
#pragma once

#include <cfloat>

#include "ptx/sm80.cuh"
#include "softmax/cuda/row.cuh"
#include "softmax/cuda/team.cuh"

namespace jax_flash::softmax {

inline constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exponential(float x) { return ptx::exp2_approx(x * kLog2e); }

// The mask's row, or null.
__device__ __forceinline__ const uint8_t* mask_row(const ForwardParams& p,
                                                   const device::Places& places, int64_t flat) {
  if (p.mask.data == nullptr) return nullptr;
  const device::Place place = places.of(min(flat, p.rows - 1));
  return place.batch.of(p.mask) + place.row * p.mask_row_stride;
}

// Rows of up to kThreads * kVectors vectors.
template <typename Element, int kThreads, int kVectors, bool kWhole>
__global__ void __launch_bounds__(Team<kThreads>::kBlock, Team<kThreads>::kBlocks)
    forward_kernel(const __grid_constant__ ForwardParams p,
                   const __grid_constant__ device::Places places) {
  using T = Team<kThreads>;
  using R = Row<Element, kWhole>;
  constexpr int kSize = R::kSize;
  __shared__ float tops[T::kWarps], totals[T::kWarps];

  const int64_t flat = int64_t{blockIdx.x} * T::kRows + threadIdx.x / kThreads;
  const R row(p, places, flat);  // threads without a row follow, for the shuffles
  const int first = row.column(threadIdx.x % kThreads);
  constexpr int kStep = kThreads * kSize;  // columns from one vector of a thread to its next

  // All loads before the first use, and before the mask's row is found.
  typename R::Chunk x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    x[v] = row.load(static_cast<const Element*>(p.scores), first + v * kStep);
  }
  const uint8_t* mask = mask_row(p, places, flat);
  const auto hidden_of = [&](int v) {
    return Hidden<kSize, kWhole>::of(mask, first + v * kStep, row.visible);
  };
  Hidden<kSize, kWhole> hidden[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (first + v * kStep < row.visible) hidden[v] = hidden_of(v);
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
  const float inverse = total == 0.0f || isnan(total) ? 1.0f : 1.0f / total;
  if (isnan(total)) {  // what is hidden is 0 even so; it is read again, not kept for this
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (first + v * kStep >= row.visible) break;
      const Hidden<kSize, kWhole> again = hidden_of(v);
#pragma unroll
      for (int i = 0; i < kSize; ++i) s[v][i] = again[i] ? 0.0f : NAN;
    }
  }

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = first + v * kStep;
    if (column >= row.columns) break;
    typename R::Chunk out;
    if (column < row.visible) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) s[v][i] *= inverse;
      out = R::Chunk::narrow(s[v]);
    }
    row.store(static_cast<Element*>(p.probs), column, out);
  }
}

// Rows of any length: a block each. A thread's sum is relative to the largest score that it has
// seen, but finite: +inf then makes the sum infinite.
template <typename Element, int kThreads, int kUnroll>
__global__ void __launch_bounds__(kThreads, Team<kThreads>::kBlocks)
    long_forward_kernel(const __grid_constant__ ForwardParams p,
                        const __grid_constant__ device::Places places) {
  using T = Team<kThreads>;
  using R = Row<Element, false>;
  constexpr int kSize = R::kSize, kStep = kThreads * kSize;
  __shared__ float tops[T::kWarps], totals[T::kWarps];

  const R row(p, places, blockIdx.x);
  const uint8_t* mask = mask_row(p, places, blockIdx.x);
  const Element* scores = static_cast<const Element*>(p.scores);

  float top = -FLT_MAX, total = 0.0f;
  for (int first = row.column(threadIdx.x); first < row.visible; first += kUnroll * kStep) {
    typename R::Chunk x[kUnroll];
    Hidden<kSize, false> hidden[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int column = first + u * kStep;
      x[u] = row.load(scores, column);
      if (column < row.visible) hidden[u] = Hidden<kSize, false>::of(mask, column, row.visible);
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
        const auto hidden = Hidden<kSize, false>::of(mask, column, row.visible);
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
