// lse, the label's logit and the sum of all logits of each row, in one pass over the row.
//
// A thread keeps the sum of exponentials relative to the largest logit it has seen; at the end the
// threads of a row agree on the largest of all. docs/kernels/cross_entropy.md has the figures.
#pragma once

#include <cfloat>

#include "cross_entropy/cuda/row.cuh"
#include "device/warp.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::cross_entropy {

// sum = sum exp(z - reference), where `reference` is the largest z, but finite: a row of -inf has
// sum 0, one with +inf has sum +inf, and NaN stays NaN.
struct ExpSum {
  float reference = -FLT_MAX, sum = 0.0f;

  __device__ __forceinline__ static float exponential(float x) {
    return ptx::exp2_approx(x * kLog2e);
  }
  __device__ __forceinline__ void rescale(float largest) {
    const float next = fminf(fmaxf(reference, largest), FLT_MAX);
    sum *= exponential(reference - next);
    reference = next;
  }
  template <int kCount>
  __device__ __forceinline__ void add(const float (&z)[kCount]) {
    float largest = z[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, z[i]);
    rescale(largest);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exponential(z[i] - reference);
  }
  // Over the lanes of the warp; every lane gets the result.
  __device__ __forceinline__ void warp_combine() {
    rescale(device::warp_max(reference));
    sum = device::warp_sum(sum);
  }
  __device__ __forceinline__ float log() const { return reference + logf(sum); }
};

template <typename Element, bool kTotal, int kUnroll, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  using Vector = device::Vector<Element, 16 / sizeof(Element)>;
  constexpr int kSize = 16 / sizeof(Element), kMaxWarps = kThreads / 32;
  __shared__ ExpSum warp_sums[kMaxWarps];
  __shared__ float warp_totals[kMaxWarps];

  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const int32_t label = p.labels[row];
  if (label == kIgnored) {
    if (threadIdx.x == 0) {
      p.lse[row] = INFINITY;
      p.label_logit[row] = 0.0f;
      if (kTotal) p.total[row] = 0.0f;
    }
    return;
  }

  const int64_t first = row * p.vocabulary;
  const Element* logits = static_cast<const Element*>(p.logits) + first;
  const Columns<kSize> columns(first, p.vocabulary);
  const Element* body = logits + columns.head;
  const int thread = threadIdx.x, threads = blockDim.x;

  ExpSum exp_sum;
  float total = 0.0f;
  const auto scaled = [&](Element x) { return device::to_float(x) * p.scale; };
  const auto take = [&](const Vector& v) {
    float z[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      z[j] = scaled(v.at[j]);
      if (kTotal) total += z[j];
    }
    exp_sum.add(z);
  };
  const auto take_one = [&](int column) {
    const float z[1] = {scaled(logits[column])};
    if (kTotal) total += z[0];
    exp_sum.add(z);
  };

  // Tiles of kUnroll vectors a thread: the next one is on its way while this one is summed.
  const int tile = kUnroll * threads;
  Vector next[kUnroll];
  const auto load = [&](int i) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * threads;
      if (at < columns.vectors) next[u] = Vector::load_streamed(body + at * kSize);
    }
  };
  load(thread);
  for (int i = thread; i < columns.vectors; i += tile) {
    Vector now[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) now[u] = next[u];
    load(i + tile);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * threads < columns.vectors) take(now[u]);
    }
  }
  if (thread < columns.head) take_one(thread);
  if (thread < columns.tail) take_one(columns.column_of_tail(thread));

  exp_sum.warp_combine();
  if (kTotal) total = device::warp_sum(total);
  if (threads > 32) {
    if (thread % 32 == 0) {
      warp_sums[thread / 32] = exp_sum;
      if (kTotal) warp_totals[thread / 32] = total;
    }
    __syncthreads();  // the first warp reads what all have written
    if (thread >= 32) return;
    exp_sum = thread < threads / 32 ? warp_sums[thread] : ExpSum();
    exp_sum.warp_combine();
    if (kTotal) total = device::warp_sum(thread < threads / 32 ? warp_totals[thread] : 0.0f);
  }
  if (thread == 0) {
    p.lse[row] = exp_sum.log();
    const bool is_class = label >= 0 && label < p.vocabulary;
    p.label_logit[row] = is_class ? scaled(logits[label]) : 0.0f;
    if (kTotal) p.total[row] = total;
  }
}

}  // namespace jax_flash::cross_entropy
