// The first warpgroup of backward.cuh: one thread that takes key tiles and brings the operands, and
// one thread a consumer warpgroup that adds what this makes of dQ to the sums.
#pragma once

#include "attention/cuda/sm90/backward_common.cuh"
#include "attention/cuda/sm90/backward_steps.cuh"
#include "attention/cuda/sm90/backward_terms.cuh"
#include "ptx/sm90.cuh"

namespace jax_flash::attention::sm90 {

// The producer thread: takes key tiles, walks over their steps and starts all copies.
template <class Traits>
__device__ __forceinline__ void produce(const BackwardArguments& a, typename Traits::Smem& smem) {
  constexpr int kBlockM = Traits::kBlockM;
  Ring<Traits::kStages> ring;
  Ring<2> keys;
  for (int t = 0;; ++t) {
    // NOTE: no sooner, or who has the longest tile also has the next one from the start.
    // Even the first is taken from the counter: where tiles wait for earlier ones, these are then
    // always those of CTAs that run.
    const int index = atomicAdd(a.next_tile, 1);
    KeyTilePlace& place = smem.places[t % 2];
    ptx::Mbarrier& place_full = smem.place_full[t % 2];
    ptx::mbarrier_wait(smem.place_empty[t % 2], (t / 2 & 1) ^ 1);
    if (index >= a.num_places) {
      place.exists = false;
      ptx::mbarrier_arrive(place_full);
      return;
    }
    ptx::mbarrier_arrive_expect(place_full, sizeof(KeyTilePlace));
    ptx::bulk_load(&place, a.places + index, sizeof(KeyTilePlace), place_full);
    ptx::mbarrier_wait(place_full, t / 2 & 1);
    int steps = place.num_steps;
    if (steps == 0) continue;

    const auto load_keys = [&](typename Traits::KeyTile& destination, const OperandMap& map,
                               ptx::Mbarrier& full, ptx::Mbarrier& empty, uint32_t phase) {
      ptx::mbarrier_wait(empty, phase ^ 1);
      ptx::mbarrier_arrive_expect(full, sizeof(typename Traits::KeyTile));
      load_tile(destination, map, place.batch, place.kv_head,
                place.sequence.key_start + place.sequence.first_row, full,
                ptx::L2Hint::kEvictFirst);
    };
    load_keys(smem.k[keys.stage], a.k, smem.k_full[keys.stage], smem.k_empty[keys.stage],
              keys.phase);
    StepWalk walk(place);
    for (bool is_first = true;; is_first = false) {
      const int stage = ring.stage, row = walk.query_tile * kBlockM, head = walk.head;
      const int sum = walk.sum(a, place);
      const char* stats =
          reinterpret_cast<char*>(a.plan.stats) + int64_t{sum} * (kPlanStatBytes * kBlockM);
      constexpr uint32_t kBytes = sizeof(typename Traits::QueryTile);

      ptx::mbarrier_wait(smem.q_empty[stage], ring.phase ^ 1);
      typename Traits::Step& step = smem.steps[stage];
      smem.targets[ring.phase * Traits::kStages + stage] =
          find_target<Traits>(a, place, sum, row, steps == 1);
      step.head = head;
      step.row = row;
      step.is_full = place.range.is_full(walk.query_tile);
      step.is_last = steps == 1;
      ptx::mbarrier_arrive_expect(smem.q_full[stage], kBytes + 2 * Traits::kTermRows * kBlockM);
      load_tile(smem.q[stage], a.q, place.batch, head, place.sequence.query_start + row,
                smem.q_full[stage], ptx::L2Hint::kEvictLast);
      load_terms<Traits::kTermRows>(smem.terms[stage], stats, smem.q_full[stage]);

      // After the first Q: V's place is free when the last step of the tile before has its dP.
      if (is_first) load_keys(smem.v, a.v, smem.v_full, smem.v_empty, keys.stage);
      ptx::mbarrier_wait(smem.dout_empty[stage], ring.phase ^ 1);
      constexpr uint32_t kDeltaBytes = Traits::kHasDropout ? 2 * kBlockM : 0;
      ptx::mbarrier_arrive_expect(smem.dout_full[stage], kBytes + kDeltaBytes);
      load_tile(smem.dout[stage], a.dout, place.batch, head, place.sequence.query_start + row,
                smem.dout_full[stage], ptx::L2Hint::kEvictLast);
      if constexpr (Traits::kHasDropout) {
        ptx::bulk_load(smem.minus_delta[stage], stats + kMinusDelta<kBlockM>, kDeltaBytes,
                       smem.dout_full[stage]);
      }
      ring.advance();
      if (--steps == 0) break;
      walk.advance(place);
    }
    keys.advance();
  }
}

// One thread a consumer warpgroup: adds its blocks of dQ to the sums.
template <class Traits>
__device__ __forceinline__ void add_blocks(const BackwardArguments& a, typename Traits::Smem& smem,
                                           int consumer) {
  static_assert(Traits::kTargets == 4);
  const DqOrder order = a.dq_order;
  const auto look = [&](const DqTarget& target) {
    return order == DqOrder::kAny            ? 0
           : order == DqOrder::kFirstClaimed ? target.claim(consumer)
                                             : target.look(consumer);
  };
  int state = 0;
  bool has_looked = false;
  for (int i = 0;; ++i) {
    ptx::mbarrier_wait(smem.dq_full[consumer], i & 1);
    if (smem.is_end[consumer]) break;
    const DqTarget target = smem.targets[i % 4];
    if (!has_looked) state = look(target);
    const bool is_first =
        order == DqOrder::kFirstClaimed ? state == 0 : order == DqOrder::kFixed && target.turn == 0;
    float* const sum = target.sum + consumer * (64 * 64);
    constexpr uint32_t kBytes = sizeof(smem.dq[0]);
    if (is_first) {
      ptx::bulk_store(sum, smem.dq[consumer], kBytes);
    } else {
      if (target.turn > 0) {
        while (state < target.turn) state = target.look(consumer);
        ptx::fence_async_global();
      }
      ptx::bulk_reduce_add(sum, smem.dq[consumer], kBytes);
    }
    ptx::bulk_commit();
    ptx::bulk_wait<0, true>();
    ptx::mbarrier_arrive(smem.dq_empty[consumer]);
    // Ahead: the answer takes a third of a step.
    has_looked = !target.is_last;
    if (has_looked) state = look(smem.targets[(i + 1) % 4]);
    if (is_first || order == DqOrder::kFixed) {
      ptx::bulk_wait<0, false>();
      target.tell(consumer);
    }
  }
  ptx::bulk_wait<0, false>();  // Shared memory outlives the last copy.
}

}  // namespace jax_flash::attention::sm90
