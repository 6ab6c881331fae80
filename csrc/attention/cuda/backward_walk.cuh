// What a CTA of the backward works on: a key tile of one kv head, and one after another the query
// tiles that see it, for every query head of the group. Both architectures' kernels walk this way.
#pragma once

#include "attention/cuda/backward_plan.h"
#include "attention/cuda/blocks.cuh"
#include "attention/cuda/seqlen.cuh"

namespace jax_flash::attention {

struct BackwardArguments {
  BackwardParams p;
  BackwardPlan plan;
};

// One pass over one query tile of one head.
struct BackwardStep {
  int head = 0, row = -1;  // first query of the tile, from the sequence's start; -1: no more steps
  bool is_full = false;

  __device__ bool exists() const { return row >= 0; }
};

// Where a CTA works. It lies in shared memory, since it is read a few times a step and would cost
// the registers that the accumulators need.
struct BackwardPlace {
  int slot = 0, kv_head = 0;
  BatchIndex batch;
  Sequence sequence;
  TileRange range;         // query tiles that see the key tile
  int64_t query_tile = 0;  // of head 0 and the sequence's first rows: [batches, heads, query_slots]
  float* dq_sum = nullptr;
  float* dkv_sum = nullptr;  // of this tile and split

  // The list of (head of the group, tile of the range) is shared by key_splits CTAs: this one takes
  // the positions [next, last), without those that a block mask leaves out.
  int next = 0, last = 0, first_head = 0;
  int window = 0;                 // position of bit 0 of active
  uint32_t active = 0, full = 0;  // of the 32 positions from window on

  // CTA `index` of [batches, kv_heads, key_splits, key_stride] at key tile `slot`. All lanes of a
  // warp must call it together.
  template <int kBlockM, int kBlockN>
  __device__ static BackwardPlace find(const BackwardArguments& a, int64_t index, int slot) {
    const int64_t column = index / a.plan.key_stride / a.plan.key_splits;
    const int64_t batch_index = column / a.p.kv_heads;
    const int kv_head = static_cast<int>(column % a.p.kv_heads);
    const int64_t split = index / a.plan.key_stride % a.plan.key_splits;
    BackwardPlace place{.slot = slot, .kv_head = kv_head, .batch = BatchIndex(a.p, batch_index)};
    Sequence& s = place.sequence;
    s = find_sequence(a.p, place.batch, Axis::kKey, kBlockN, slot);
    place.range = query_tiles<kBlockM, kBlockN>(s, s.first_row);
    place.query_tile = batch_index * a.p.heads * a.plan.query_slots;
    if (a.p.mask.varlen) place.query_tile += s.query_start / kBlockM + s.index + 1;
    place.dq_sum = a.plan.dq_sum;
    if (a.p.deterministic) place.dq_sum += index % a.plan.key_stride * a.plan.dq_elements;
    place.dkv_sum = a.plan.dkv_sum + split * 2 * a.plan.dkv_elements +
                    (column * a.plan.key_slots + slot) * a.plan.key_tile_elements;

    const int group = static_cast<int>(a.p.heads / a.p.kv_heads);
    const int64_t length =
        static_cast<int64_t>(max(place.range.end - place.range.begin, 0)) * group;
    place.first_head = kv_head * group;
    place.next = static_cast<int>(length * split / a.plan.key_splits);
    place.last = static_cast<int>(length * (split + 1) / a.plan.key_splits);
    return place;
  }

  // The step at a position of the list.
  template <int kBlockM>
  __device__ BackwardStep step_at(int position) const {
    const int count = range.end - range.begin, tile = range.begin + position % count;
    return {first_head + position / count, tile * kBlockM, range.is_full(tile)};
  }
};

// Writes the place's next step. All lanes of a warp must call it together.
template <int kBlockM, int kBlockN>
__device__ inline void next_step(const BackwardParams& p, BackwardPlace& place,
                                 BackwardStep& result) {
  const bool is_writer = threadIdx.x % 32 == 0;
  if (p.mask.block_mask.data == nullptr) {
    if (is_writer) {
      const int position = place.next;
      result = position < place.last ? place.step_at<kBlockM>(position) : BackwardStep{};
      if (position < place.last) place.next = position + 1;
    }
    return;
  }
  uint32_t active = place.active, full = place.full;
  int window = place.window, next = place.next;
  while (active == 0 && next < place.last) {
    window = next;
    next += 32;
    const int position = window + static_cast<int>(threadIdx.x % 32);
    bool any = false, all = false;
    if (position < place.last) {
      const Sequence& s = place.sequence;
      const BackwardStep candidate = place.step_at<kBlockM>(position);
      BlockMask(p.mask, place.batch, candidate.head)
          .classify(candidate.row, min(candidate.row + kBlockM, s.query_length), s.first_row,
                    min(s.first_row + kBlockN, s.key_length), any, all);
    }
    active = __ballot_sync(device::kWarp, any);
    full = __ballot_sync(device::kWarp, all);
  }
  __syncwarp();  // All lanes have read the place.
  if (is_writer) {
    BackwardStep step;
    if (active != 0) {
      const int bit = __ffs(active) - 1;
      step = place.step_at<kBlockM>(window + bit);
      step.is_full = step.is_full && (full >> bit & 1) != 0;
    }
    result = step;
    place.active = active & (active - 1);
    place.full = full;
    place.window = window;
    place.next = next;
  }
  __syncwarp();  // The place is written before its lanes read it again.
}

}  // namespace jax_flash::attention
