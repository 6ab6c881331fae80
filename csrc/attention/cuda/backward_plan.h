// How one backward call is cut into CTAs, and where its workspace lies. The same rule, written in
// Python, sizes the buffer (_ops/attention.py: cuda_backward_workspace); it depends on
// shapes alone, never on the device.
#pragma once

#include <vector_types.h>

#include <algorithm>
#include <cstdint>

#include "attention/params.h"

namespace jax_flash::attention {

inline constexpr int kPlanQueries = 64, kPlanKeys = 128;     // nominal tiles
inline constexpr int64_t kPlanStatBytes = 18;                // of a row
inline constexpr int64_t kPlanPlaceBytes = 128;              // of an sm_90a key tile's entry
inline constexpr int64_t kPlanCtas = 264;                    // two a multiprocessor of an H200
inline constexpr int64_t kPlanDqBytes = int64_t{512} << 20;  // the most that dq_buffers may take
inline constexpr int64_t kPlanMaxKeySplits = 16;

struct BackwardPlan {
  int64_t batches = 1;
  int64_t query_slots = 0, key_slots = 0;  // per batch entry (seqlen.cuh)
  int64_t key_splits =
      1;  // CTAs that share the queries of a key tile, each with its own dK, dV sum
  int64_t key_stride = 0;  // a CTA takes every key_stride-th key tile: key_slots (one tile), or,
                           // where deterministic, dq_buffers
  int64_t dq_buffers = 1;  // dQ sums; where deterministic, one a CTA of the head

  // Workspace. The rows are those of whole slots; inside a slot the elements of a sum lie in the
  // order of the kernel's accumulators: [register][thread].
  // [batches, heads, query_slots, kBlockM * 18 bytes]: lse * log2(e) and delta of each row, or on
  // sm_90a what backward_terms.cuh says.
  float2* stats = nullptr;
  float* dq_sum = nullptr;   // [dq_buffers, batches, heads, query_slots, kBlockM * head_dim]
  float* dkv_sum = nullptr;  // [key_splits, 2, batches, kv_heads, key_slots, kBlockN * head_dim];
                             // empty with one split
  int64_t dq_elements = 0, dkv_elements = 0;  // of one dQ sum; of one split's dK or dV sum
  int64_t key_tile_elements = 0;              // of one slot's dK or dV
  // The sm_90a kernels' own: a list of their key tiles; counters, of tiles taken and, where
  // deterministic, of the additions to each tile of dQ.
  void* places = nullptr;   // [batches, kv_heads, key slots of 64, key_splits] entries, and the end
  int* counters = nullptr;  // [4 + 2 * batches * heads * query slots of 64]
  int64_t bytes = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t plan_slots(const Problem& p, int64_t total, int block) {
  return p.mask.varlen ? total / block + p.num_sequences + 2 : ceil_div(total, block);
}

// The head dim of the kernel that serves the call.
inline int padded_head_dim(const Problem& p) {
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

inline BackwardPlan make_backward_plan(const BackwardParams& p, int block_m, int block_n) {
  BackwardPlan plan;
  const int head_dim = padded_head_dim(p);
  plan.batches = p.batch_shape[0] * p.batch_shape[1] * p.batch_shape[2];
  plan.query_slots = plan_slots(p, p.seq_q, block_m);
  plan.key_slots = plan_slots(p, p.seq_k, block_n);
  plan.dq_elements = plan.batches * p.heads * plan.query_slots * block_m * head_dim;
  plan.dkv_elements = plan.batches * p.kv_heads * plan.key_slots * block_n * head_dim;
  plan.key_tile_elements = int64_t{block_n} * head_dim;

  // Fill the GPU. These choices use the nominal tiles, so that Python need not know the kernel's.
  const int64_t columns = plan.batches * p.kv_heads;
  const int64_t tiles = ceil_div(p.seq_k, kPlanKeys);
  plan.key_stride = plan.key_slots;
  if (p.deterministic) {
    const int64_t dq_bytes = plan.batches * p.heads * plan_slots(p, p.seq_q, kPlanQueries) *
                             kPlanQueries * head_dim * int64_t{sizeof(float)};
    const int64_t wanted = std::min(tiles, ceil_div(kPlanCtas, columns));
    plan.dq_buffers = std::max(int64_t{1}, std::min(wanted, kPlanDqBytes / dq_bytes));
    plan.key_stride = plan.dq_buffers;
  } else {
    const int64_t steps = p.heads / p.kv_heads * ceil_div(p.seq_q, kPlanQueries);
    plan.key_splits =
        std::max(int64_t{1},
                 std::min({kPlanCtas / (columns * tiles), ceil_div(steps, 4), kPlanMaxKeySplits}));
  }

  // Lay out the workspace; float2 first, everything a multiple of 16 bytes.
  const int64_t stats_bytes = plan.batches * p.heads * plan.query_slots * block_m * kPlanStatBytes;
  const int64_t dq_bytes = plan.dq_buffers * plan.dq_elements * 4;
  const int64_t dkv_bytes = plan.key_splits > 1 ? plan.key_splits * 2 * plan.dkv_elements * 4 : 0;
  char* base = static_cast<char*>(p.workspace);
  plan.stats = reinterpret_cast<float2*>(base);
  plan.dq_sum = reinterpret_cast<float*>(base + stats_bytes);
  plan.dkv_sum = reinterpret_cast<float*>(base + stats_bytes + dq_bytes);
  base += stats_bytes + dq_bytes + dkv_bytes;
  const int64_t places_bytes =
      (columns * plan.key_splits * plan_slots(p, p.seq_k, 64) + 1) * kPlanPlaceBytes;
  plan.places = base;
  plan.counters = reinterpret_cast<int*>(base + places_bytes);
  const int64_t counters_bytes =
      ceil_div(4 + 2 * plan.batches * p.heads * plan_slots(p, p.seq_q, 64), 4) * 16;
  plan.bytes = stats_bytes + dq_bytes + dkv_bytes + places_bytes + counters_bytes;
  return plan;
}

}  // namespace jax_flash::attention
