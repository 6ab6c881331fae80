// The launches of one backward call: preprocess, the main kernel, postprocess.
#pragma once

#include "attention/cuda/instances.h"
#include "attention/cuda/sm80/backward.cuh"
#include "attention/cuda/sm80/postprocess.cuh"

namespace jax_flash::attention::sm80 {

template <typename Kernel, typename Arguments>
const char* launch(Kernel* kernel, int64_t ctas, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments& arguments) {
  if (ctas > INT32_MAX) return "jax_flash: expected fewer than 2^31 tiles in the grid";
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kernel<<<static_cast<unsigned>(ctas), threads, shared_bytes, stream>>>(arguments);
  return launch_status();
}

template <class Traits>
const char* launch_backward(const BackwardParams& p, cudaStream_t stream) {
  using Element = typename Traits::Element;
  using QueryTile = typename Traits::QueryTile;
  using KeyTile = typename Traits::KeyTile;
  const BackwardArguments a{p, make_backward_plan(p, Traits::kBlockM, Traits::kBlockN)};
  const BackwardPlan& plan = a.plan;
  if (plan.bytes > p.workspace_bytes) {
    return "jax_flash: workspace: smaller than the CUDA backward needs";
  }
  const bool has_dropout = p.dropout.threshold > 0;
  const float dropout = dropout_scale(p.dropout);

  if (const char* error =
          launch(preprocess_kernel<Element, Traits::kHeadDim, Traits::kBlockM>,
                 plan.batches * p.heads * plan.query_slots, kPreprocessThreads, 0, stream, a)) {
    return error;
  }
  const int64_t ctas = plan.batches * p.kv_heads * plan.key_splits * plan.key_stride;
  if (const char* error =
          launch(has_dropout ? backward_kernel<Traits, true> : backward_kernel<Traits, false>, ctas,
                 Traits::kThreads, sizeof(typename Traits::Smem), stream, a)) {
    return error;
  }
  const PostprocessArguments dq{.p = p,
                                .out = p.dq,
                                .sum = plan.dq_sum,
                                .buffers = plan.dq_buffers,
                                .buffer_stride = plan.dq_elements,
                                .slots = plan.query_slots,
                                .heads = p.heads,
                                .dim = static_cast<int>(p.head_dim),
                                .scale = p.scale * dropout};
  if (const char* error = launch(postprocess_kernel<Element, typename Traits::QueryWarps, QueryTile,
                                                    Traits::kThreads, Axis::kQuery>,
                                 plan.batches * p.heads * plan.query_slots, Traits::kThreads,
                                 sizeof(QueryTile), stream, dq)) {
    return error;
  }
  if (plan.key_splits == 1) return nullptr;
  for (const bool is_value : {false, true}) {
    const PostprocessArguments dkv{.p = p,
                                   .out = is_value ? p.dv : p.dk,
                                   .sum = plan.dkv_sum + (is_value ? plan.dkv_elements : 0),
                                   .buffers = plan.key_splits,
                                   .buffer_stride = 2 * plan.dkv_elements,
                                   .slots = plan.key_slots,
                                   .heads = p.kv_heads,
                                   .dim = static_cast<int>(is_value ? p.value_dim : p.head_dim),
                                   .scale = is_value ? dropout : p.scale * dropout};
    if (const char* error = launch(postprocess_kernel<Element, typename Traits::KeyWarps, KeyTile,
                                                      Traits::kThreads, Axis::kKey>,
                                   plan.batches * p.kv_heads * plan.key_slots, Traits::kThreads,
                                   sizeof(KeyTile), stream, dkv)) {
      return error;
    }
  }
  return nullptr;
}

// Tiles by head dim: queries x keys, warps, stages, staggered. The large form needs the shared
// memory of an H100 (227 KB); the small form fits every GPU since sm_80 (99 KB).
template <typename Element, int kHeadDim>
struct BackwardForms;
template <typename Element>
struct BackwardForms<Element, 64> {
  using Large = BackwardTraits<Element, 64, 64, 128, 4, 2, false>;
  using Small = Large;
};
template <typename Element>
struct BackwardForms<Element, 128> {
  using Large = BackwardTraits<Element, 128, 64, 128, 8, 3, true>;
  using Small = BackwardTraits<Element, 128, 64, 64, 4, 1, false>;
};
template <typename Element>
struct BackwardForms<Element, 256> {
  using Large = BackwardTraits<Element, 256, 64, 64, 8, 2, false>;
  using Small = BackwardTraits<Element, 256, 32, 32, 4, 1, false>;
};

template <typename Element, int kHeadDim>
const char* choose_backward(const BackwardParams& p, cudaStream_t stream) {
  using Large = typename BackwardForms<Element, kHeadDim>::Large;
  using Small = typename BackwardForms<Element, kHeadDim>::Small;
  static_assert(sizeof(typename Small::Smem) <= 99 * 1024);
  static_assert(sizeof(typename Large::Smem) <= 227 * 1024);
  if constexpr (!std::is_same_v<Large, Small>) {
    int device = 0, shared_bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (shared_bytes >= static_cast<int>(sizeof(typename Large::Smem))) {
      return launch_backward<Large>(p, stream);
    }
  }
  return launch_backward<Small>(p, stream);
}

}  // namespace jax_flash::attention::sm80
