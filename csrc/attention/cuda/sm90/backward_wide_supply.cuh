// The first two warpgroups of the kernel in backward_wide.cuh: warps of the first bring the
// operands and look after dS's way from the keys CTA to the values CTA, the second makes dQ.
#pragma once

#include "attention/cuda/sm90/backward_common.cuh"
#include "attention/cuda/sm90/backward_steps.cuh"
#include "device/opaque.cuh"
#include "device/warp.cuh"
#include "ptx/cluster.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

// One arrival of the warp at a barrier of CTA `rank`.
__device__ __forceinline__ void release_at(ptx::Mbarrier& barrier, uint32_t rank) {
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_at(barrier, rank);
}

// One warp: takes key tiles, walks over their steps and starts all copies.
template <class Traits, bool kIsValues>
__device__ __forceinline__ void bring_operands(const BackwardArguments& a,
                                               typename Traits::Smem& smem) {
  using KeyTile = typename Traits::KeyTile;
  using HalfKeyTile = typename Traits::HalfKeyTile;
  using QueryTile = typename Traits::QueryTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  const bool is_leader = threadIdx.x == 0;
  Ring<Traits::template kSlots<kIsValues>> ring;
  uint32_t phases = 0;  // bit 0: of the keys' barriers, bit 1: of `ragged`
  int index = static_cast<int>(blockIdx.x / 2);

  for (int t = 0;; ++t) {
    KeyTilePlace& place = smem.places[t % 2];
    ptx::Mbarrier& place_full = smem.place_full[t % 2];
    // The values CTA takes the place, for both.
    if (is_leader) {
      ptx::mbarrier_arrive_expect(place_full, sizeof(KeyTilePlace));
      if constexpr (kIsValues) {
        ptx::mbarrier_wait(smem.place_empty[t % 2], (t / 2 & 1) ^ 1);
        // NOTE: no sooner, or who has the longest tile also has the next one from the start.
        if (t > 0) index = atomicAdd(a.next_tile, 1) + device::opaque(gridDim.x) / 2;
        ptx::bulk_load_to_all(&place, a.places + min(index, a.num_places), sizeof(KeyTilePlace),
                              place_full, 3);
      }
    }
    __syncwarp();  // The leader has armed the barrier that others now wait for.
    ptx::mbarrier_wait(place_full, t / 2 & 1);
    if (!device::uniform(place.exists)) return;
    const int steps = device::uniform(place.num_steps);
    const auto leave_place = [&] {
      __syncwarp();  // All lanes of the values CTA, whose leader takes the next one, have left it.
      if (!kIsValues) ptx::mbarrier_arrive_at(smem.place_empty[t % 2], 0);
    };
    if (steps == 0) {
      leave_place();
      continue;
    }
    const Sequence& s = place.sequence;

    // Rows that others own are zeroed before those who read them are told: what lies there could be
    // NaN.
    const auto load_keys = [&] {
      const int rows = s.key_length - s.first_row, first = s.key_start + s.first_row;
      const bool is_whole = rows >= kBlockN;
      const OperandMap& operand = kIsValues ? a.k : a.v;
      if (is_leader) {
        ptx::Mbarrier& full = is_whole ? smem.keys_full : smem.ragged;
        ptx::mbarrier_wait(smem.keys_empty, ~phases & 1);
        ptx::mbarrier_arrive_expect(
            full, sizeof(KeyTile) + (is_whole || kIsValues ? 0 : sizeof(HalfKeyTile)));
        load_tile(smem.keys, operand, place.batch, place.kv_head, first, full,
                  ptx::L2Hint::kEvictFirst);
        if constexpr (!kIsValues) {
          ptx::Mbarrier& half_full = is_whole ? smem.half_full : smem.ragged;
          ptx::mbarrier_wait(smem.dq_done, ~phases & 1);
          if (is_whole) ptx::mbarrier_arrive_expect(half_full, sizeof(HalfKeyTile));
          load_tile(smem.half_keys, a.k, place.batch, place.kv_head, first, half_full,
                    ptx::L2Hint::kEvictFirst, Traits::kHeadDim / 2);
        }
      }
      __syncwarp();  // As above.
      if (!is_whole) {
        ptx::mbarrier_wait(smem.ragged, phases >> 1);
        phases ^= 2;
        zero_rows<32>(smem.keys, rows);
        if constexpr (!kIsValues) zero_rows<32>(smem.half_keys, rows);
        ptx::fence_async_shared();
        __syncwarp();  // All lanes' rows are zero and fenced.
        release(smem.keys_full);
        if constexpr (!kIsValues) release(smem.half_full);
      }
      phases ^= 1;
    };

    StepWalk walk(place);
    for (int i = 0; i < steps; ++i) {
      const int head = walk.head, query_tile = walk.query_tile;
      const int row = query_tile * kBlockM, rows = s.query_length - row;
      const int sum = walk.sum(a, place);
      const bool is_whole = rows >= kBlockM;
      const bool is_full = place.range.is_full(query_tile);
      const char* stats =
          reinterpret_cast<const char*>(a.plan.stats) + int64_t{sum} * (kPlanStatBytes * kBlockM);
      constexpr uint32_t kStatBytes = kBlockM * sizeof(float);
      constexpr uint32_t kMinusDeltaBytes = Traits::kHasDropout && !kIsValues ? 2 * kBlockM : 0;
      // Q, or dO; a step's first also says what it is and has the stats that are read with it, lse
      // or delta. NOTE: all that is needed is at hand before the wait, behind which all others
      // wait.
      const auto load_queries = [&](bool is_q, bool is_first) {
        const OperandMap& operand = is_q ? a.q : a.dout;
        const int slot = ring.stage, entry = operand.batch(place.batch.axis);
        const int first = s.query_start + row;
        QueryTile& tile = smem.tiles[slot];
        ptx::mbarrier_wait(smem.empty[slot], ring.phase ^ 1);
        if (is_leader) {
          ptx::Mbarrier& full = is_whole ? smem.full[slot] : smem.ragged;
          if (is_first) smem.steps[slot] = {head, row, is_full, i + 1 == steps};
          ptx::mbarrier_arrive_expect(
              full, sizeof(QueryTile) + (is_first ? kStatBytes + kMinusDeltaBytes : 0));
#pragma unroll
          for (int slab = 0; slab < QueryTile::kSlabs; ++slab) {
            ptx::tma_load(reinterpret_cast<char*>(tile.data) + slab * QueryTile::kSlabBytes,
                          operand.map, full, 64 * slab, first, head, entry,
                          ptx::L2Hint::kEvictLast);
          }
          if (is_first) {
            ptx::bulk_load(smem.stats[slot], stats + (kIsValues ? 0 : kStatBytes), kStatBytes,
                           full);
            if constexpr (kMinusDeltaBytes > 0) {
              ptx::bulk_load(smem.minus_delta[slot], stats + kMinusDelta<kBlockM>, kMinusDeltaBytes,
                             full);
            }
          }
        }
        __syncwarp();  // As above.
        if (!is_whole) {
          ptx::mbarrier_wait(smem.ragged, phases >> 1);
          phases ^= 2;
          zero_rows<32>(tile, rows);
          ptx::fence_async_shared();
          __syncwarp();  // All lanes' rows are zero and fenced.
          release(smem.full[slot]);
        }
        ring.advance();
      };
      load_queries(kIsValues, true);
      load_queries(!kIsValues, false);
      // Behind the first queries: their place is free before that of the last tile's keys.
      if (i == 0) load_keys();
      walk.advance(place);
    }
    leave_place();
  }
}

// One thread: does something for each step of each place that the CTAs take.
template <class Traits, typename Function>
__device__ __forceinline__ void for_each_step(typename Traits::Smem& smem,
                                              const Function& function) {
  for (int t = 0;; ++t) {
    ptx::mbarrier_wait(smem.place_full[t % 2], t / 2 & 1);
    const KeyTilePlace& place = smem.places[t % 2];
    if (!place.exists) break;
    const int steps = place.num_steps;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) function();
    ptx::mbarrier_arrive_at(smem.place_empty[t % 2], 0);
  }
}

// One thread of the keys CTA: copies each dS to the values CTA.
template <class Traits>
__device__ __forceinline__ void pass_scores(typename Traits::Smem& smem) {
  Ring<2> ring;
  uint32_t phase = 0;
  for_each_step<Traits>(smem, [&] {
    ptx::mbarrier_wait(smem.own_ds_full, phase);
    ptx::mbarrier_wait(smem.ds_empty[ring.stage], ring.phase ^ 1);
    ptx::bulk_copy_to(&smem.ds[ring.stage], &smem.own_ds, sizeof(smem.own_ds),
                      smem.ds_full[ring.stage], 0);
    phase ^= 1;
    ring.advance();
  });
}

// One thread of the values CTA: tells the keys CTA that a dS is here, and expects the next but one.
template <class Traits>
__device__ __forceinline__ void confirm_scores(typename Traits::Smem& smem) {
  Ring<2> ring;
  for_each_step<Traits>(smem, [&] {
    ptx::mbarrier_wait(smem.ds_full[ring.stage], ring.phase);
    ptx::mbarrier_arrive_expect(smem.ds_full[ring.stage], sizeof(typename Traits::ScoreTile));
    ptx::mbarrier_arrive_at(smem.own_ds_empty, 1);
    ring.advance();
  });
}

// One warpgroup: dQ = dS K, a half of the dims (the values CTA's the first), in blocks of 64
// queries x 64 dims, added to the sums from registers: shared memory is full.
template <class Traits, bool kIsValues>
__device__ __forceinline__ void make_dq(const BackwardArguments& a, typename Traits::Smem& smem) {
  using KeyTile = typename Traits::KeyTile;
  using HalfKeyTile = typename Traits::HalfKeyTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kBlocks = Traits::kHeadDim / 128, kFirstBlock = kIsValues ? 0 : kBlocks;
  static_assert(kBlockM == 64 && KeyTile::kSlabBytes == HalfKeyTile::kSlabBytes);
  const int thread = threadIdx.x % 128;
  Ring<kIsValues ? 2 : 1> ring;
  uint32_t key_phase = 0;
  for (int t = 0;; ++t) {
    ptx::mbarrier_wait(smem.place_full[t % 2], t / 2 & 1);
    const KeyTilePlace& place = smem.places[t % 2];
    if (!device::uniform(place.exists)) break;
    const int steps = device::uniform(place.num_steps);
    StepWalk walk(place);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int sum = walk.sum(a, place);
      float* const dq = a.plan.dq_sum + int64_t{sum} * (kBlockM * Traits::kHeadDim);
      walk.advance(place);
      if (!kIsValues && i == 0) {
        ptx::mbarrier_wait(smem.half_full, key_phase);
        key_phase ^= 1;
      }
      ptx::mbarrier_wait(kIsValues ? smem.ds_full[ring.stage] : smem.own_ds_full, ring.phase);
      const ptx::MatrixDescriptor ds = ptx::MatrixDescriptor(&smem.ds[ring.stage], 0);
#pragma unroll 1
      for (int block = 0; block < kBlocks; ++block) {
        const ptx::MatrixDescriptor keys =
            (kIsValues ? ptx::MatrixDescriptor(&smem.keys, KeyTile::kSlabBytes)
                       : ptx::MatrixDescriptor(&smem.half_keys, KeyTile::kSlabBytes)) +
            block * (KeyTile::kSlabBytes >> 4);
        float rDQ[8][4];
        multiply_scores<typename Traits::Element, kBlockN, false>(rDQ, ds, keys);
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(rDQ);
        if (block == kBlocks - 1) {
          if constexpr (kIsValues) {
            release_at(smem.ds_empty[ring.stage], 1);
          } else {
            release(smem.own_ds_empty);
          }
          if (i == steps - 1) release(smem.dq_done);
        }
        float* const target = dq + (kFirstBlock + block) * 4096;
#pragma unroll
        for (int n = 0; n < 8; ++n) ptx::red_add_4(target + (n * 128 + thread) * 4, rDQ[n]);
      }
      ring.advance();
    }
    ptx::mbarrier_arrive_at(smem.place_empty[t % 2], 0);
  }
}

}  // namespace jax_flash::attention::sm90
