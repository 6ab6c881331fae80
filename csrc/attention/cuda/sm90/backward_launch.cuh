// The launches of one Hopper backward: prepare, the main kernel, finish.
#pragma once

#include "attention/cuda/architecture.h"
#include "attention/cuda/instances.h"
#include "attention/cuda/scheduler.cuh"
#include "attention/cuda/sm90/backward.cuh"
#include "attention/cuda/sm90/backward_column.cuh"
#include "attention/cuda/sm90/backward_passes.cuh"
#include "attention/cuda/sm90/backward_supplier.cuh"
#include "attention/cuda/sm90/backward_wide.cuh"

namespace jax_flash::attention::sm90 {

inline bool is_unmasked(const Problem& p) {
  return p.mask.window_right >= p.seq_k && p.mask.window_left >= p.seq_q && !p.mask.varlen;
}

// Columns (batch entry, kv head) whose key tiles pass by together. Where a mask makes some tiles
// longer than others, so many that a handful of CTAs share a column's queries: with fewer, all add
// to the same sums of dQ; with more, L2 no longer serves them. Where key tiles wait for those
// before them, so many that these are ahead. hopper_backward.md has the measurements.
template <class Traits>
int section_columns(const BackwardParams& p, const BackwardPlan& plan) {
  const int64_t columns = plan.batches * p.kv_heads;
  int64_t section = 8;
  if (Traits::kStoresFirst && is_unmasked(p)) {
    section = std::max<int64_t>(8, 64 / plan.key_slots);
  } else if (is_unmasked(p)) {
    section = 1;
  } else if (Traits::kStoresFirst) {
    section = p.deterministic && plan.key_slots <= 8 ? 64 : 32;
  }
  while (columns % section != 0) --section;
  return static_cast<int>(section);
}

// Should the sums of dQ begin with a store? It saves the zeros of a tile that few are added to, and
// what waits for it is less where many key tiles a CTA have come apart.
inline bool suits_first_store(const BackwardParams& p, const BackwardPlan& plan) {
  return plan.key_slots <= 32 && plan.batches * p.kv_heads * plan.key_slots >= 4 * kPlanCtas;
}

template <class Traits, typename Kernel>
const char* launch_backward(const BackwardParams& p, cudaStream_t stream, Kernel* kernel) {
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  BackwardArguments a{p, make_backward_plan(p, kBlockM, kBlockN)};
  BackwardPlan& plan = a.plan;
  constexpr bool kColumns = kTakesColumns<Traits>;
  if (kColumns) plan.key_splits = 1;
  if ((p.deterministic && !Traits::kAddsInOrder) || p.mask.block_mask.data != nullptr ||
      !(p.scale >= kMinTermScale<typename Traits::Element>)) {
    return kNotCovered;
  }
  const int64_t columns = plan.batches * p.kv_heads, key_tiles = columns * plan.key_slots;
  const int64_t num_places = key_tiles * plan.key_splits;
  const int64_t query_tiles = plan.batches * p.heads * plan.query_slots;
  if (num_places > INT32_MAX / 2 || query_tiles > INT32_MAX / 2) return kNotCovered;
  a.num_places = static_cast<int>(num_places);
  a.section = kColumns ? 1 : section_columns<Traits>(p, plan);

  if (plan.bytes > p.workspace_bytes) {
    return "jax_flash: workspace: smaller than the CUDA backward needs";
  }
  static_assert(sizeof(KeyTilePlace) <= kPlanPlaceBytes);
  a.places = static_cast<KeyTilePlace*>(plan.places);
  a.next_tile = plan.counters;
  a.dq_states = plan.counters + 4;
  if (Traits::kStoresFirst && suits_first_store(p, plan)) a.dq_order = DqOrder::kFirstClaimed;
  if (p.deterministic) a.dq_order = DqOrder::kFixed;
  a.lse_factor = -1.0f / (p.scale * 1.4426950408889634f);
  if (!make_operand_map(p, p.q, p.seq_q, p.heads, p.head_dim, kBlockM, a.q) ||
      !make_operand_map(p, p.k, p.seq_k, p.kv_heads, p.head_dim, kBlockN, a.k) ||
      !make_operand_map(p, p.v, p.seq_k, p.kv_heads, p.value_dim, kBlockN, a.v) ||
      !make_operand_map(p, p.dout, p.seq_q, p.heads, p.value_dim, kBlockM, a.dout)) {
    return kNotCovered;
  }
  if (kColumns && (!make_operand_map(p, p.dk, p.seq_k, p.kv_heads, p.head_dim, 16, a.dk) ||
                   !make_operand_map(p, p.dv, p.seq_k, p.kv_heads, p.value_dim, 16, a.dv))) {
    return kNotCovered;
  }

  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  constexpr int kSharedBytes = sizeof(typename Traits::Smem);
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  // CTAs, or clusters of them, each with a key tile or a column at a time.
  a.workers = static_cast<int>(
      std::min<int64_t>(kColumns ? columns : num_places, multiprocessors / Traits::kClusterSize));
  prepare_kernel<Traits>
      <<<static_cast<unsigned>(query_tiles + ceil_div(num_places + 1, kPlacesPerCta)), kPassThreads,
         0, stream>>>(a);
  kernel<<<static_cast<unsigned>(a.workers * Traits::kClusterSize), Traits::kThreads, kSharedBytes,
           stream>>>(a);
  if (kColumns) return launch_status();
  const int64_t finish_ctas = query_tiles + (plan.key_splits > 1 ? 2 * key_tiles : 0);
  finish_kernel<Traits><<<static_cast<unsigned>(finish_ctas), kPassThreads, 0, stream>>>(a);
  return launch_status();
}

// Should a CTA have whole columns? While Q, dO and the sums of dQ of all CTAs' columns, 512 bytes a
// row, fit L2 (60 MB), and not where too many CTAs would be without one. H200, over the other form,
// T = 256, 512, 1024, 2048: full 1.43, 1.21, 0.80, 0.70; causal 1.59, 1.36, 1.06, 0.82.
inline bool suits_columns(const BackwardParams& p) {
  const MaskParams& mask = p.mask;
  const bool has_lengths = mask.varlen || mask.query_lengths.data != nullptr ||
                           mask.key_lengths.data != nullptr || mask.causal_offset.data != nullptr;
  const bool is_full = mask.window_right >= p.seq_k && mask.window_left >= p.seq_q;
  const bool has_diagonal = p.seq_q == p.seq_k && mask.window_right >= 0 && mask.window_left >= 0;
  // Every query sees a key: who ends dQ's sums writes them.
  if (has_lengths || !(is_full || has_diagonal)) return false;
  const int64_t column_rows = p.heads / p.kv_heads * p.seq_q;
  if (column_rows > (is_full ? 512 : 1024)) return false;
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t columns = num_batches(p) * p.kv_heads;
  return 5 * columns >= 4 * ceil_div(columns, multiprocessors) * multiprocessors;
}

// Queries of a step and stages by head dim.
template <typename Element, int kHeadDim, bool kHasDropout>
const char* choose_backward(const BackwardParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim == 64) {
    if constexpr (!kHasDropout) {
      using Columns = ColumnTraits<Element>;
      if (suits_columns(p)) {
        const char* error = launch_backward<Columns>(p, stream, column_kernel<Columns>);
        if (error != kNotCovered) return error;
      }
    }
    using Traits = SupplierTraits<Element, 64, 128, 2, kHasDropout>;
    return launch_backward<Traits>(p, stream, supplier_kernel<Traits>);
  } else if constexpr (kHeadDim == 256) {
    using Traits = WideTraits<Element, 256, kHasDropout>;
    return launch_backward<Traits>(p, stream, wide_kernel<Traits>);
  } else {
    using Traits = BackwardTraits<Element, kHeadDim, 64, 2, kHasDropout>;
    return launch_backward<Traits>(p, stream, backward_kernel<Traits>);
  }
}

}  // namespace jax_flash::attention::sm90
