// dlogits_v = scale * (dlse * exp(z_v - lse) + dlabel * [v = label] + dtotal), one read and one
// write an element, in place where dlogits is logits. A row without dlse is not read.
#pragma once

#include "cross_entropy/cuda/row.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::cross_entropy {

template <typename Element, typename Result, int kThreads, int kUnroll, int kBlocks>
__global__ void __launch_bounds__(kThreads == 32 ? 256 : kThreads, kBlocks)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kSize = 16 / sizeof(Element);
  using ResultVector = device::Vector<Result, kSize>;

  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kThreads == 32 ? blockDim.y : 1) + threadIdx.y;
  if (row >= p.rows) return;
  const int64_t first = row * p.vocabulary;
  const Element* logits = static_cast<const Element*>(p.logits) + first;
  Result* dlogits = static_cast<Result*>(p.dlogits) + first;
  const Columns<kSize> columns(first, p.vocabulary);
  const int thread = threadIdx.x;

  const float scale = p.scale, lse = p.lse[row], dlse = p.dlse[row];
  const float slope = scale * dlse, constant = p.dtotal == nullptr ? 0.0f : scale * p.dtotal[row];
  const bool reads = dlse != 0.0f;
  // NOTE: the difference before the factor: exp(0) is 1 however large the logits are.
  const auto dlogit = [&](float x) {
    const float shift = fmaf(x, scale, -lse);
    return fmaf(slope, ptx::exp2_approx(shift * kLog2e), constant);
  };

  // The label's logit, kept by the thread that will overwrite it.
  const int32_t label = p.labels[row];
  const bool owns_label =
      label >= 0 && label < p.vocabulary && thread == columns.owner(label, kThreads);
  const float label_logit = owns_label && reads ? device::to_float(logits[label]) : 0.0f;

  const auto put_one = [&](int column) {
    if (column < 0) return;
    dlogits[column] =
        device::from_float<Result>(reads ? dlogit(device::to_float(logits[column])) : constant);
  };
  put_one(columns.head_column(thread));
  put_one(columns.tail_column(thread));

  const uint4* source = reinterpret_cast<const uint4*>(logits + columns.origin) + thread;
  ResultVector* target = reinterpret_cast<ResultVector*>(dlogits + columns.origin) + thread;
  for (int i = thread; i < columns.end; i += kUnroll * kThreads) {
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (reads && columns.has(i + u * kThreads)) words[u] = __ldcs(source + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!columns.has(i + u * kThreads)) continue;
      float x[kSize];
      to_floats<Element>(words[u], x);
      ResultVector out;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        out.at[j] = device::from_float<Result>(reads ? dlogit(x[j]) : constant);
      }
      target[u * kThreads] = out;
    }
    source += kUnroll * kThreads;
    target += kUnroll * kThreads;
  }

  if (owns_label) {
    const float others = reads ? dlogit(label_logit) : constant;
    dlogits[label] = device::from_float<Result>(fmaf(scale, p.dlabel[row], others));
  }
}

}  // namespace jax_flash::cross_entropy
