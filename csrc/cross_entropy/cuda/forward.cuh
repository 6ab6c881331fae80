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

// sum = sum exp(scale * (x - reference)), where `reference` is the x of the largest scale * x: the
// largest x or, of a negative scale, the smallest. It is finite: a row whose z are -inf has sum 0,
// one with +inf has sum +inf, and NaN stays NaN.
template <bool kNegativeScale>
struct ExpSum {
  static constexpr float kLowest = kNegativeScale ? FLT_MAX : -FLT_MAX;     // z is lowest there
  static constexpr float kNothing = kNegativeScale ? INFINITY : -INFINITY;  // exp(z) is 0 there

  float reference = kLowest, sum = 0.0f;

  __device__ __forceinline__ static float top(float a, float b) {
    return kNegativeScale ? fminf(a, b) : fmaxf(a, b);
  }
  // factor: scale * log2(e)
  __device__ __forceinline__ void rescale(float largest, float factor) {
    const float next = fminf(fmaxf(top(reference, largest), -FLT_MAX), FLT_MAX);
    sum *= ptx::exp2_approx((reference - next) * factor);
    reference = next;
  }
  template <int kRows, int kSize>
  __device__ __forceinline__ void add(const float (&x)[kRows][kSize], float factor) {
    float largest = x[0][0];
#pragma unroll
    for (int i = 1; i < kRows * kSize; ++i) largest = top(largest, x[i / kSize][i % kSize]);
    rescale(largest, factor);
#pragma unroll
    for (int i = 0; i < kRows * kSize; ++i) {
      sum += ptx::exp2_approx((x[i / kSize][i % kSize] - reference) * factor);
    }
  }
  // Over lanes that share a row; each gets the result.
  template <int kLanes>
  __device__ __forceinline__ void combine(const device::Lanes<kLanes>& lanes, float factor) {
    rescale(kNegativeScale ? -lanes.max(-reference) : lanes.max(reference), factor);
    sum = lanes.sum(sum);
  }
};

// A thread's sums over its columns of a row; then those of all kThreads that share the row.
template <typename Element, bool kTotal, bool kNegativeScale, int kThreads>
class RowSums {
 public:
  using Sum = ExpSum<kNegativeScale>;
  static constexpr int kSize = 16 / sizeof(Element), kWarps = kThreads <= 32 ? 1 : kThreads / 32;
  struct Smem {
    float references[kWarps], sums[kWarps], totals[kWarps];
  };

  Sum exp_sum;
  float total = 0.0f;

  __device__ explicit RowSums(float factor) : factor_(factor) {}

  // A column of head or tail, or none: -1.
  __device__ __forceinline__ void take_one(const Element* logits, int column) {
    const float x[1][1] = {{column < 0 ? Sum::kNothing : device::to_float(logits[column])}};
    if (kTotal && column >= 0) total += x[0][0];
    exp_sum.add(x, factor_);
  }
  // Every kThreads-th vector from the i-th; what lies outside of the row is kNothing.
  template <int kUnroll>
  __device__ __forceinline__ void add(const float (&x)[kUnroll][kSize]) {
    exp_sum.add(x, factor_);
  }
  template <int kUnroll>
  __device__ __forceinline__ void add_total(const float (&x)[kUnroll][kSize],
                                            const Columns<kSize>& columns, int i) {
    if constexpr (kTotal) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (!columns.has(i + u * kThreads)) continue;
        if constexpr (kSize == 4) {
          total += (x[u][0] + x[u][1]) + (x[u][2] + x[u][3]);
        } else {
#pragma unroll
          for (int j = 0; j < kSize; ++j) total += x[u][j];
        }
      }
    }
  }
  // Over the lanes of a warp, or of the row where that is less.
  __device__ __forceinline__ void combine_lanes() {
    exp_sum.combine(lanes_, factor_);
    if (kTotal) total = lanes_.sum(total);
  }
  // Over the warps: each leaves its sums; after a barrier, a warp that calls `gather` has all.
  __device__ __forceinline__ void leave(Smem& smem) const {
    if (threadIdx.x % 32 != 0) return;
    smem.references[threadIdx.x / 32] = exp_sum.reference;
    smem.sums[threadIdx.x / 32] = exp_sum.sum;
    smem.totals[threadIdx.x / 32] = total;
  }
  __device__ __forceinline__ void gather(const Smem& smem) {
    const int lane = threadIdx.x % 32;
    const bool exists = lane < kWarps;
    exp_sum.reference = exists ? smem.references[lane] : Sum::kLowest;
    exp_sum.sum = exists ? smem.sums[lane] : 0.0f;
    exp_sum.combine(lanes_, factor_);
    if (kTotal) total = lanes_.sum(exists ? smem.totals[lane] : 0.0f);
  }
  __device__ __forceinline__ float lse(float scale) const {
    return fmaf(exp_sum.reference, scale, logf(exp_sum.sum));
  }

 private:
  device::Lanes<kThreads <= 32 ? kThreads : 32> lanes_;
  float factor_;  // scale * log2(e)
};

// Two elements of 16 bits, or one of 32.
template <typename Element>
__device__ __forceinline__ uint32_t bits_of_word(float x) {
  if constexpr (sizeof(Element) == 2) {
    return device::pack<Element>(x, x);
  } else {
    return __float_as_uint(x);
  }
}

template <typename Element, bool kTotal, bool kNegativeScale, int kThreads, int kUnroll,
          int kBlocks>
__global__ void __launch_bounds__(kThreads <= 32 ? kSmallBlock : kThreads, kBlocks)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  using Sums = RowSums<Element, kTotal, kNegativeScale, kThreads>;
  constexpr int kSize = Sums::kSize;
  __shared__ typename Sums::Smem smem;

  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads <= 32 ? blockDim.y : 1) + threadIdx.y;
  if (row >= p.rows) return;
  const int64_t first = row * p.vocabulary;
  const Element* logits = static_cast<const Element*>(p.logits) + first;
  const Columns<kSize> columns(first, p.vocabulary);
  const int thread = threadIdx.x;

  // Tiles of kUnroll vectors a thread: the next one is on its way while this one is summed. What
  // lies outside of the row adds nothing.
  const uint4* source = reinterpret_cast<const uint4*>(logits + columns.origin) + thread;
  const uint32_t nothing = bits_of_word<Element>(Sums::Sum::kNothing);
  uint4 next[kUnroll];
  const auto load = [&](int i) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      next[u] = {nothing, nothing, nothing, nothing};
      if (columns.has(i + u * kThreads)) next[u] = __ldcs(source + u * kThreads);
    }
    source += kUnroll * kThreads;
  };
  load(thread);

  const int32_t label = p.labels[row];
  if (label == kIgnored) {
    if (thread == 0) {
      p.lse[row] = INFINITY;
      p.label_logit[row] = 0.0f;
      if (kTotal) p.total[row] = 0.0f;
    }
    return;
  }
  const bool is_class = label >= 0 && label < p.vocabulary;
  const float label_logit = thread == 0 && is_class ? device::to_float(logits[label]) : 0.0f;

  Sums sums(p.scale * kLog2e);
  sums.take_one(logits, columns.head_column(thread));
  sums.take_one(logits, columns.tail_column(thread));
  for (int i = thread; i < columns.end; i += kUnroll * kThreads) {
    float x[kUnroll][kSize];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) to_floats<Element>(next[u], x[u]);
    load(i + kUnroll * kThreads);
    sums.add(x);
    sums.add_total(x, columns, i);
  }

  sums.combine_lanes();
  if constexpr (kThreads > 32) {
    sums.leave(smem);
    __syncthreads();  // the first warp reads what all have written
    if (thread >= 32) return;
    sums.gather(smem);
  }
  if (thread == 0) {
    p.lse[row] = sums.lse(p.scale);
    p.label_logit[row] = label_logit * p.scale;
    if (kTotal) p.total[row] = sums.total * p.scale;
  }
}

}  // namespace jax_flash::cross_entropy
