// The first warpgroup of the kernel in backward_column.cuh.
#pragma once

#include "attention/cuda/dropout.cuh"
#include "attention/cuda/sm90/backward_common.cuh"
#include "attention/cuda/sm90/backward_terms.cuh"
#include "device/warp.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

// Brings the operands of the CTA's columns blockIdx.x, blockIdx.x + gridDim.x, ... and makes dQ =
// dS K, in blocks of 64 queries. A thread keeps its elements of dQ's sums in the CTA's part of the
// workspace, [head of the group][query tile][block][n][thread][4]: it stores those of the first key
// tile, adds to them, and finds them again for the last one. Nobody else touches them, so that
// there is nothing to wait for, and the order of the additions is that of the key tiles.
template <class Traits>
__device__ __forceinline__ void supply_column(const BackwardArguments& a,
                                              typename Traits::Smem& smem) {
  using Element = typename Traits::Element;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using ScoreTile = typename Traits::ScoreTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kPlaces = Traits::kPlaces;
  // NOTE: what only the leader needs is in shared memory, or computed again: dQ needs the registers.
  const auto is_leader = [] { return device::thread_index() == 0; };
  typename Traits::Cursor& next = smem.next;
  // The leader asks for place `i`. Four are in use: dQ is being made of step n, n + 2 is loaded and
  // the place after its own on its way, and key tiles can have one step each.
  static_assert(kPlaces == 4 && Traits::kStages == 2);
  const auto request = [&](int i, int index) {
    ptx::mbarrier_arrive_expect(smem.place_full[i % kPlaces], sizeof(KeyTilePlace));
    ptx::bulk_load(&smem.places[i % kPlaces], a.places + index, sizeof(KeyTilePlace),
                   smem.place_full[i % kPlaces]);
  };
  // The leader starts the copies of the next step; before a key tile's first also those of K and V,
  // whose place is free: dQ of the key tile before the last is made. NOTE: rows past the end of the
  // arrays come as zeros.
  const auto load_step = [&](int loaded) {
    int t = next.key_tile;
    if (next.steps == 0) {
      if (next.is_end) return;
      next.key_tile = ++t;
      ptx::mbarrier_wait(smem.place_full[t % kPlaces], t / kPlaces & 1);
      const KeyTilePlace& place = smem.places[t % kPlaces];
      next.steps = place.num_steps;
      next.head = place.first_head;
      next.query_tile = place.first_tile;
      next.is_end = place.next >= a.num_places;
      if (!next.is_end) request(t + 1, place.next);
      ptx::Mbarrier& full = smem.keys_full[t % 2];
      const int row = place.sequence.first_row;
      ptx::mbarrier_arrive_expect(full, 2 * sizeof(KeyTile));
      load_tile(smem.k[t % 2], a.k, place.batch, place.kv_head, row, full,
                ptx::L2Hint::kEvictFirst);
      load_tile(smem.v[t % 2], a.v, place.batch, place.kv_head, row, full,
                ptx::L2Hint::kEvictFirst);
    }
    const KeyTilePlace& place = smem.places[t % kPlaces];
    const int head = next.head, query_tile = next.query_tile, left = next.steps;
    const int stage = loaded % 2, row = query_tile * kBlockM;
    const int query_slots = static_cast<int>(a.plan.query_slots);
    const int group = static_cast<int>(a.p.heads) / static_cast<int>(a.p.kv_heads);
    const int own_tile = (static_cast<int>(blockIdx.x) * group + head - place.first_head) *
                             query_slots + query_tile;
    const int64_t tile = place.query_tile + head * query_slots + query_tile;
    const char* stats = reinterpret_cast<char*>(a.plan.stats) + tile * (kPlanStatBytes * kBlockM);
    constexpr uint32_t kTermBytes = 2 * Traits::kTermRows * kBlockM;
    constexpr uint32_t kDeltaBytes = kBlockM * sizeof(float);
    ptx::Mbarrier &q_full = smem.q_full[stage], &dout_full = smem.dout_full[stage];
    ptx::mbarrier_wait(smem.q_empty[stage], (loaded / 2 & 1) ^ 1);
    typename Traits::Step& step = smem.steps[loaded % Traits::kSteps];
    step.sum = a.plan.dq_sum + int64_t{own_tile} * (kBlockM * Traits::kHeadDim);
    step.dq = element_pointer<Element>(a.p.dq, place.batch, row, head);
    step.keys = t % 2;
    step.row = row;
    step.is_full = place.range.is_full(query_tile);
    step.is_last = left == 1;
    step.is_end = left == 1 && next.is_end;
    step.begins_sum = query_tile >= place.first_unseen;
    step.completes_sum = query_tile < place.end_of_complete;
    const ptx::L2Hint hint =
        step.completes_sum ? ptx::L2Hint::kEvictFirst : ptx::L2Hint::kEvictNormal;
    ptx::mbarrier_arrive_expect(q_full, sizeof(QueryTile) + kTermBytes);
    load_tile(smem.q[stage], a.q, place.batch, head, row, q_full, hint);
    load_terms<Traits::kTermRows>(smem.terms[stage], stats, q_full);
    ptx::mbarrier_wait(smem.dout_empty[stage], (loaded / 2 & 1) ^ 1);
    ptx::mbarrier_arrive_expect(dout_full, sizeof(QueryTile) + kDeltaBytes);
    load_tile(smem.dout[stage], a.dout, place.batch, head, row, dout_full, hint);
    ptx::bulk_load(smem.delta[stage], stats + kTermBytes, kDeltaBytes, dout_full);
    next.steps = left - 1;
    next.query_tile = query_tile + 1;
    if (query_tile + 1 == place.range.end) {
      next.query_tile = place.range.begin;
      next.head = head + 1;
    }
  };

  if (is_leader()) {
    next = {.key_tile = -1, .steps = 0, .is_end = false};
    request(0, static_cast<int>(blockIdx.x * a.plan.key_slots));
  }
#pragma unroll 1
  for (int made = -2;; ++made) {
    if (made >= 0) {
      const int stage = made % 2;
      ptx::mbarrier_wait(smem.q_full[stage], made / 2 & 1);
      const typename Traits::Step& step = smem.steps[made % Traits::kSteps];
      const bool begins = device::uniform(static_cast<int>(step.begins_sum)) != 0;
      const bool completes = device::uniform(static_cast<int>(step.completes_sum)) != 0;
      const KeyTile& keys = smem.k[device::uniform(step.keys)];
#pragma unroll 1
      for (int block = 0; block < kBlockM / 64; ++block) {
        float* const sum = step.sum + block * 4096 + 4 * threadIdx.x;
        float rDQ[8][4] = {};
        if (completes && !begins) {
#pragma unroll
          for (int n = 0; n < 8; ++n) ptx::load_relaxed_4(sum + n * 512, rDQ[n]);
        }
        if (block == 0) ptx::mbarrier_wait(smem.ds_full[stage], made / 2 & 1);
        const ptx::MatrixDescriptor ds =
            ptx::MatrixDescriptor(&smem.ds[stage], 0) + block * (ScoreTile::kSlabBytes >> 4);
        const ptx::MatrixDescriptor k = ptx::MatrixDescriptor(&keys, KeyTile::kSlabBytes);
        ptx::wgmma_pin(rDQ);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBlockN / 16; ++i) {
          ptx::wgmma<Element, true, true>(rDQ, ds + i * ptx::kRows16, k + i * ptx::kRows16, true);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(rDQ);
        if (block == kBlockM / 64 - 1) release(smem.ds_empty[stage]);
        if (completes) {
          store_block_words<Element>(
              rDQ, a.p.scale, static_cast<Element*>(step.dq) + 64 * block * a.p.dq.row_stride,
              a.p.dq.row_stride, static_cast<int>(a.p.seq_q) - step.row - 64 * block,
              static_cast<int>(a.p.head_dim));
        } else if (begins) {
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            *reinterpret_cast<float4*>(sum + n * 512) = {rDQ[n][0], rDQ[n][1], rDQ[n][2],
                                                         rDQ[n][3]};
          }
        } else {
#pragma unroll
          for (int n = 0; n < 8; ++n) ptx::red_add_4(sum + n * 512, rDQ[n]);
        }
      }
    }
    if (made >= 0 && device::uniform(static_cast<int>(smem.steps[made % Traits::kSteps].is_end))) {
      break;
    }
    if (is_leader()) {
      // All warps have read the step, dS and K: their places may be filled again.
      if (made >= 0) ptx::mbarrier_wait(smem.ds_empty[made % 2], made / 2 & 1);
      load_step(made + 2);
    }
  }
}

}  // namespace jax_flash::attention::sm90
