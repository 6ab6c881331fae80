// dlogits_v = scale * (dlse * exp(z_v - lse) + dlabel * [v = label] + dtotal), one read and one
// write an element, in place where dlogits is logits. Here: what a row needs, and the kernel of
// short rows, several a block, which does not read those without dlse.
#pragma once

#include "cross_entropy/cuda/row.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::cross_entropy {

struct Cotangents {
  float dlse = 0.0f, dlabel = 0.0f, dtotal = 0.0f;
};

__device__ __forceinline__ Cotangents cotangents_of(const BackwardParams& p, int64_t row,
                                                    float lse) {
  if (p.loss.row_weights == nullptr) {
    return {p.dlse[row], p.dlabel[row], p.dtotal == nullptr ? 0.0f : p.dtotal[row]};
  }
  const Loss& loss = p.loss;
  const float weight = loss.row_weights[row];
  if (weight == 0.0f) return {};  // lse may be anything
  return {weight * (1.0f + 2.0f * loss.z_loss * lse), (loss.label_smoothing - 1.0f) * weight,
          -loss.label_smoothing / loss.classes * weight};
}

// The first row of dlogits: whatever the device says, rows lie inside and vectors are aligned.
__device__ __forceinline__ int64_t first_result_row(const BackwardParams& p) {
  if (p.first_row == nullptr) return 0;
  const int64_t first = max(static_cast<int64_t>(*p.first_row), INT64_C(0));
  return min(first, p.result_rows - p.rows) & ~INT64_C(7);
}

// The gradient of a row's logits but for the label's own.
struct Gradient {
  float scale, lse, slope, constant;
  bool reads;  // whether it depends on the logits

  __device__ __forceinline__ Gradient(const BackwardParams& p, const Cotangents& d, float lse)
      : scale(p.scale),
        lse(lse),
        slope(p.scale * d.dlse),
        constant(p.scale * d.dtotal),
        reads(d.dlse != 0.0f) {}
  // NOTE: the difference before the factor: exp(0) is 1 however large the logits are.
  __device__ __forceinline__ float operator()(float x) const {
    if (!reads) return constant;  // whatever x is
    const float shift = fmaf(x, scale, -lse);
    return fmaf(slope, ptx::exp2_approx(shift * kLog2e), constant);
  }
};

// Rows of a warp or less.
template <typename Element, typename Result, int kThreads, int kUnroll>
__global__ void __launch_bounds__(kSmallBlock, 4)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kSize = 16 / sizeof(Element);
  using ResultVector = device::Vector<Result, kSize>;

  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const int64_t first = row * p.vocabulary;
  const Element* logits = static_cast<const Element*>(p.logits) + first;
  Result* dlogits = static_cast<Result*>(p.dlogits) + first_result_row(p) * p.vocabulary + first;
  const Columns<kSize> columns(first, p.vocabulary);
  const int thread = threadIdx.x;

  const float lse = p.lse[row];
  const Cotangents d = cotangents_of(p, row, lse);
  const Gradient gradient(p, d, lse);

  // The label's logit, kept by the thread that will overwrite it.
  const int32_t label = p.labels[row];
  const bool owns_label =
      label >= 0 && label < p.vocabulary && thread == columns.owner(label, kThreads);
  const auto logit = [&](int column) {
    return gradient.reads ? device::to_float(logits[column]) : 0.0f;
  };
  const float label_logit = owns_label ? logit(label) : 0.0f;

  const auto put_one = [&](int column) {
    if (column >= 0) dlogits[column] = device::from_float<Result>(gradient(logit(column)));
  };
  put_one(columns.head_column(thread));
  put_one(columns.tail_column(thread));

  const uint4* source = reinterpret_cast<const uint4*>(logits + columns.origin) + thread;
  ResultVector* target = reinterpret_cast<ResultVector*>(dlogits + columns.origin) + thread;
  for (int i = thread; i < columns.end; i += kUnroll * kThreads) {
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (gradient.reads && columns.has(i + u * kThreads)) words[u] = __ldcs(source + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!columns.has(i + u * kThreads)) continue;
      float x[kSize];
      to_floats<Element>(words[u], x);
      ResultVector out;
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.at[j] = device::from_float<Result>(gradient(x[j]));
      target[u * kThreads] = out;
    }
    source += kUnroll * kThreads;
    target += kUnroll * kThreads;
  }

  if (owns_label) {
    dlogits[label] = device::from_float<Result>(fmaf(p.scale, d.dlabel, gradient(label_logit)));
  }
}

}  // namespace jax_flash::cross_entropy
