// dlogits_v = scale * (dlse * exp(z_v - lse) + dlabel * [v = label] + dtotal), one read and one
// write an element, in place where dlogits is logits. A row without dlse is not read.
#pragma once

#include "cross_entropy/cuda/row.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::cross_entropy {

template <typename Element, typename Result, int kUnroll, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kSize = 16 / sizeof(Element);
  using Vector = device::Vector<Element, kSize>;
  using ResultVector = device::Vector<Result, kSize>;

  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const int64_t first = row * p.vocabulary;
  const Element* logits = static_cast<const Element*>(p.logits) + first;
  Result* dlogits = static_cast<Result*>(p.dlogits) + first;
  const Columns<kSize> columns(first, p.vocabulary);
  const int thread = threadIdx.x, threads = blockDim.x;

  const float lse = p.lse[row], dlse = p.dlse[row];
  const float dtotal = p.dtotal == nullptr ? 0.0f : p.dtotal[row];
  const float slope = p.scale * dlse, constant = p.scale * dtotal;
  const auto dlogit = [&](Element x) {
    const float shift = fmaf(device::to_float(x), p.scale, -lse);
    return fmaf(slope, ptx::exp2_approx(shift * kLog2e), constant);
  };

  // The label's logit, read by the thread that will overwrite it.
  const int32_t label = p.labels[row];
  const bool owns_label =
      label >= 0 && label < p.vocabulary && thread == columns.owner(label, threads);
  Element label_logit{};
  if (owns_label && dlse != 0.0f) label_logit = logits[label];

  if (dlse == 0.0f) {
    ResultVector fill;
#pragma unroll
    for (int j = 0; j < kSize; ++j) fill.at[j] = device::from_float<Result>(constant);
    for (int i = thread; i < columns.vectors; i += threads) {
      fill.store_streamed(dlogits + columns.column_of_vector(i));
    }
    if (thread < columns.head) dlogits[thread] = fill.at[0];
    if (thread < columns.tail) dlogits[columns.column_of_tail(thread)] = fill.at[0];
  } else {
    const auto put = [&](const Vector& v, int i) {
      ResultVector out;
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.at[j] = device::from_float<Result>(dlogit(v.at[j]));
      out.store_streamed(dlogits + columns.column_of_vector(i));
    };
    const auto put_one = [&](int column) {
      dlogits[column] = device::from_float<Result>(dlogit(logits[column]));
    };
    for (int i = thread; i < columns.vectors; i += kUnroll * threads) {
      Vector v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * threads;
        if (at < columns.vectors) {
          v[u] = Vector::load_streamed(logits + columns.column_of_vector(at));
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = i + u * threads;
        if (at < columns.vectors) put(v[u], at);
      }
    }
    if (thread < columns.head) put_one(thread);
    if (thread < columns.tail) put_one(columns.column_of_tail(thread));
  }

  if (owns_label) {
    const float others = dlse == 0.0f ? constant : dlogit(label_logit);
    dlogits[label] = device::from_float<Result>(fmaf(p.scale, p.dlabel[row], others));
  }
}

}  // namespace jax_flash::cross_entropy
