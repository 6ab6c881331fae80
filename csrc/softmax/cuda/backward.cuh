// dS = scale * P * (dP - delta), delta = rowsum(dP * P), and 0 where P is 0, whatever dP is there.
// A thread reads what it writes and nothing else of dP, so that dS may take its memory.
#pragma once

#include "softmax/cuda/row.cuh"
#include "softmax/cuda/team.cuh"

namespace jax_flash::softmax {

template <typename Chunk>
__device__ __forceinline__ float dot(const Chunk& probs, const Chunk& dprobs, float sum) {
  float p[Chunk::kSize], dp[Chunk::kSize];
  probs.widen(p);
  dprobs.widen(dp);
#pragma unroll
  for (int i = 0; i < Chunk::kSize; ++i) {
    if (p[i] != 0.0f) sum += p[i] * dp[i];
  }
  return sum;
}

template <typename Chunk>
__device__ __forceinline__ Chunk gradient(const Chunk& probs, const Chunk& dprobs, float scale,
                                          float delta) {
  float p[Chunk::kSize], dp[Chunk::kSize];
  const uint32_t zero = threadIdx.y;  // blocks have one dimension
  probs.again(zero).widen(p);
  dprobs.again(zero).widen(dp);
#pragma unroll
  for (int i = 0; i < Chunk::kSize; ++i) {
    p[i] = p[i] != 0.0f ? scale * p[i] * (dp[i] - delta) : 0.0f;
  }
  return Chunk::narrow(p);
}

// Rows of up to kThreads * kVectors vectors, kept in registers.
template <typename Element, int kThreads, int kVectors, bool kWhole>
__global__ void __launch_bounds__(Team<kThreads>::kBlock, Team<kThreads>::kBlocks)
    backward_kernel(const __grid_constant__ BackwardParams p,
                    const __grid_constant__ device::Places places) {
  using T = Team<kThreads>;
  using R = Row<Element, kWhole>;
  __shared__ float deltas[T::kWarps];

  const int64_t flat = int64_t{blockIdx.x} * T::kRows + threadIdx.x / kThreads;
  const R row(p, places, flat);  // threads without a row follow, for the shuffles
  const int first = row.column(threadIdx.x % kThreads);
  constexpr int kStep = kThreads * R::kSize;  // columns from one vector of a thread to its next

  // All loads before the first use.
  typename R::Chunk probs[kVectors], dprobs[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    probs[v] = row.load(static_cast<const Element*>(p.probs), first + v * kStep);
    dprobs[v] = row.load(static_cast<const Element*>(p.dprobs), first + v * kStep);
  }
  float delta = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) delta = dot(probs[v], dprobs[v], delta);
  delta = T::template reduce<Sum>(delta, deltas);

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = first + v * kStep;
    if (column >= row.columns) break;
    const auto ds = gradient(probs[v], dprobs[v], p.scale, delta);
    row.store(static_cast<Element*>(p.dscores), column, ds);
  }
}

// Rows of any length: a block each, read twice.
template <typename Element, int kThreads, int kUnroll>
__global__ void __launch_bounds__(kThreads, Team<kThreads>::kBlocks)
    long_backward_kernel(const __grid_constant__ BackwardParams p,
                         const __grid_constant__ device::Places places) {
  using T = Team<kThreads>;
  using R = Row<Element, false>;
  constexpr int kStep = kThreads * R::kSize;
  __shared__ float deltas[T::kWarps];

  const R row(p, places, blockIdx.x);
  typename R::Chunk probs[kUnroll], dprobs[kUnroll];
  const auto load = [&](int first) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      probs[u] = row.load(static_cast<const Element*>(p.probs), first + u * kStep);
      dprobs[u] = row.load(static_cast<const Element*>(p.dprobs), first + u * kStep);
    }
  };

  float delta = 0.0f;
  for (int first = row.column(threadIdx.x); first < row.visible; first += kUnroll * kStep) {
    load(first);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) delta = dot(probs[u], dprobs[u], delta);
  }
  delta = T::template reduce<Sum>(delta, deltas);

  for (int first = row.column(threadIdx.x); first < row.columns; first += kUnroll * kStep) {
    load(first);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int column = first + u * kStep;
      if (column >= row.columns) break;
      const auto ds = gradient(probs[u], dprobs[u], p.scale, delta);
      row.store(static_cast<Element*>(p.dscores), column, ds);
    }
  }
}

}  // namespace jax_flash::softmax
