// Which (slot, head, batch entry) a CTA of the grid works on. Heads come in groups whose keys and
// values fit in L2; inside a group the CTAs run slot by slot, so that under a causal mask the
// heaviest tiles start first and the light ones fill the gaps at the end.
#pragma once

#include "attention/cuda/seqlen.cuh"

namespace jax_flash::attention {

struct Schedule {
  int32_t slots;          // per (head, batch entry)
  int32_t tail;           // of them, those that come when all other slots of all heads are through
  int32_t group;          // heads of a group; divides the number of heads
  uint32_t heads_of_all;  // of all batch entries
  int32_t heads, heads_per_kv;
  bool is_descending;  // last slot first

  int64_t num_ctas(const Problem& p) const { return int64_t{slots} * p.heads * num_batches(p); }
};

struct Work {
  int slot, head, kv_head;
  uint32_t batch;

  __device__ Work(const Schedule& schedule, uint32_t cta) {
    const uint32_t slots = schedule.slots - schedule.tail, heads = schedule.heads;
    const uint32_t before_tail = slots * schedule.heads_of_all;
    const bool is_tail = cta >= before_tail;
    const uint32_t group = is_tail ? schedule.heads_of_all : schedule.group;
    if (is_tail) cta -= before_tail;
    const uint32_t section = is_tail ? 0 : cta / (slots * group),
                   rest = cta - section * slots * group;
    const uint32_t head_of_all = section * group + rest % group;
    slot = static_cast<int>(rest / group + (is_tail ? slots : 0));
    if (schedule.is_descending) slot = schedule.slots - 1 - slot;
    head = static_cast<int>(head_of_all % heads);
    kv_head = head / schedule.heads_per_kv;
    batch = head_of_all / heads;
  }
};

inline constexpr int64_t kL2Bytes = INT64_C(32) << 20;  // of the 40 to 60 MB of A100 and H200

// The forward kernels' order: full attention walks the slots of one head after another, which is
// kindest to L2; a mask with a right edge makes the last slots the heaviest, and a group the most
// heads whose keys and values take at most group_bytes.
inline Schedule forward_schedule(const Problem& p, int block_m, int element_bytes,
                                 int64_t group_bytes = kL2Bytes) {
  Schedule schedule;
  schedule.slots = static_cast<int32_t>(num_slots(p, p.seq_q, block_m));
  schedule.is_descending = p.mask.window_right < p.seq_k;
  schedule.tail = 0;
  schedule.group = 1;
  schedule.heads_of_all = static_cast<uint32_t>(p.heads * num_batches(p));
  schedule.heads = static_cast<int32_t>(p.heads);
  schedule.heads_per_kv = static_cast<int32_t>(p.heads / p.kv_heads);
  if (schedule.is_descending) {
    const int64_t keys = p.seq_k / (p.mask.varlen && p.num_sequences > 0 ? p.num_sequences : 1);
    const int64_t head_bytes = keys * (p.head_dim + p.value_dim) * element_bytes;
    for (int64_t group = 1; group <= p.heads; ++group) {
      if (p.heads % group != 0) continue;
      if ((group + schedule.heads_per_kv - 1) / schedule.heads_per_kv * head_bytes <= group_bytes) {
        schedule.group = static_cast<int32_t>(group);
      }
    }
  }
  return schedule;
}

}  // namespace jax_flash::attention
