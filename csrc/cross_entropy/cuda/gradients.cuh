// Statistics of each row and the gradient of sum(row_weights * loss), in one kernel: the gradient's
// pass over the row finds it in the L2 cache, where the statistics' pass has just put it. Logits
// are float32, those of the linear form, and scale is not negative; the formulas are forward.cuh's
// and backward.cuh's.
#pragma once

#include "cross_entropy/cuda/backward.cuh"
#include "cross_entropy/cuda/forward.cuh"

namespace jax_flash::cross_entropy {

template <typename Result, bool kTotal, int kThreads, int kUnroll, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradients_kernel(const __grid_constant__ ForwardParams f,
                     const __grid_constant__ BackwardParams p) {
  using Sums = RowSums<float, kTotal, false, kThreads>;
  constexpr int kSize = Sums::kSize;
  constexpr float kNothing = Sums::Sum::kNothing;
  using ResultVector = device::Vector<Result, kSize>;
  __shared__ typename Sums::Smem smem;

  const int64_t row = blockIdx.x, first = row * f.vocabulary;
  const float* logits = static_cast<const float*>(f.logits) + first;
  Result* dlogits = static_cast<Result*>(p.dlogits) + first_result_row(p) * f.vocabulary + first;
  const Columns<kSize> columns(first, f.vocabulary);
  const int thread = threadIdx.x;
  const int32_t label = f.labels[row];
  const bool is_class = label >= 0 && label < f.vocabulary;

  // Statistics. Tiles of kUnroll vectors a thread: the next one is on its way while this one is
  // summed. What lies outside of the row adds nothing.
  float lse = INFINITY;
  if (label != kIgnored) {
    const float4* source = reinterpret_cast<const float4*>(logits + columns.origin) + thread;
    float4 next[kUnroll];
    const auto load = [&](int i) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        next[u] = {kNothing, kNothing, kNothing, kNothing};
        if (columns.has(i + u * kThreads)) next[u] = __ldcg(source + u * kThreads);
      }
      source += kUnroll * kThreads;
    };
    load(thread);
    const float label_logit = thread == 0 && is_class ? logits[label] : 0.0f;
    Sums sums(f.scale * kLog2e);
    sums.take_one(logits, columns.head_column(thread));
    sums.take_one(logits, columns.tail_column(thread));
    for (int i = thread; i < columns.end; i += kUnroll * kThreads) {
      float x[kUnroll][kSize];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        x[u][0] = next[u].x, x[u][1] = next[u].y, x[u][2] = next[u].z, x[u][3] = next[u].w;
      }
      load(i + kUnroll * kThreads);
      sums.add(x);
      sums.add_total(x, columns, i);
    }
    sums.combine_lanes();
    sums.leave(smem);
    __syncthreads();  // every warp reads what all have written
    sums.gather(smem);
    lse = sums.lse(f.scale);
    if (thread == 0) {
      f.label_logit[row] = label_logit * f.scale;
      if (kTotal) f.total[row] = sums.total * f.scale;
    }
  } else if (thread == 0) {
    f.label_logit[row] = 0.0f;
    if (kTotal) f.total[row] = 0.0f;
  }
  if (thread == 0) f.lse[row] = lse;

  // Gradient.
  const Cotangents d = cotangents_of(p, row, lse);
  const Gradient gradient(p, d, lse);
  const auto logit = [&](int column) { return gradient.reads ? logits[column] : 0.0f; };
  const auto put_one = [&](int column) {
    if (column >= 0) dlogits[column] = device::from_float<Result>(gradient(logit(column)));
  };
  put_one(columns.head_column(thread));
  put_one(columns.tail_column(thread));
  const float4* source = reinterpret_cast<const float4*>(logits + columns.origin) + thread;
  ResultVector* target = reinterpret_cast<ResultVector*>(dlogits + columns.origin) + thread;
  for (int i = thread; i < columns.end; i += kUnroll * kThreads) {
    float4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (gradient.reads && columns.has(i + u * kThreads)) words[u] = __ldcs(source + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!columns.has(i + u * kThreads)) continue;
      const float x[kSize] = {words[u].x, words[u].y, words[u].z, words[u].w};
      ResultVector out;
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.at[j] = device::from_float<Result>(gradient(x[j]));
      target[u * kThreads] = out;
    }
    source += kUnroll * kThreads;
    target += kUnroll * kThreads;
  }
  if (is_class && thread == columns.owner(label, kThreads)) {
    const float others = gradient(logit(label));
    dlogits[label] = device::from_float<Result>(fmaf(p.scale, d.dlabel, others));
  }
}

}  // namespace jax_flash::cross_entropy
