// The first warpgroup of the kernel in backward_supplier.cuh.
#pragma once

#include "attention/cuda/sm90/backward_common.cuh"
#include "attention/cuda/sm90/backward_steps.cuh"
#include "attention/cuda/sm90/backward_terms.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

enum class SupplierBarrier { kConsumers = 1, kSupplier = 2, kOwn = 3 };  // kOwn + consumer

// Takes places, brings operands and makes dQ = dS K, in blocks of 64 queries x 64 dims, which bulk
// copies add to the sums.
template <class Traits>
__device__ __forceinline__ void supply(const BackwardArguments& a, typename Traits::Smem& smem) {
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using ScoreTile = typename Traits::ScoreTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kDimBlocks = Traits::kHeadDim / 64;
  const int thread = threadIdx.x;
  const bool is_leader = thread == 0;
  Ring<Traits::kStages> ring;
  Ring<2> ds_ring;
  uint32_t key_phase = 0, ragged_phase = 0;
  int index = static_cast<int>(blockIdx.x);

  const auto sync = [] {
    ptx::named_barrier_sync(static_cast<int>(SupplierBarrier::kSupplier), 128);
  };
  // The leader asks for place `t`. NOTE: near the end of the place before, or who has the longest
  // tile also has the next one from the start.
  const auto request = [&](int t) {
    if (!is_leader) return;
    ptx::Mbarrier& full = smem.place_full[t % 2];
    ptx::mbarrier_wait(smem.place_empty[t % 2], (t / 2 & 1) ^ 1);
    if (t > 0) index = atomicAdd(a.next_tile, 1) + static_cast<int>(gridDim.x);
    if (index < a.num_places) {
      ptx::mbarrier_arrive_expect(full, sizeof(KeyTilePlace));
      ptx::bulk_load(&smem.places[t % 2], a.places + index, sizeof(KeyTilePlace), full);
    } else {
      smem.places[t % 2].exists = false;
      ptx::mbarrier_arrive(full);
    }
  };

  request(0);
  for (int t = 0;; ++t) {
    const KeyTilePlace& place = smem.places[t % 2];
    ptx::mbarrier_wait(smem.place_full[t % 2], t / 2 & 1);
    if (!place.exists) break;
    const int steps = place.num_steps;
    if (steps == 0) {
      request(t + 1);
      continue;
    }
    const Sequence& s = place.sequence;

    // K and V. Rows that others own are zeroed: what lies there could be NaN.
    const int key_rows = s.key_length - s.first_row;
    if (is_leader) {
      ptx::mbarrier_wait(smem.k_empty, key_phase ^ 1);
      const bool is_whole = key_rows >= kBlockN;
      ptx::Mbarrier& k_full = is_whole ? smem.k_full : smem.ragged;
      ptx::Mbarrier& v_full = is_whole ? smem.v_full : smem.ragged;
      ptx::mbarrier_arrive_expect(k_full, is_whole ? sizeof(KeyTile) : 2 * sizeof(KeyTile));
      load_tile(smem.k, a.k, place.batch, place.kv_head, s.key_start + s.first_row, k_full,
                ptx::L2Hint::kEvictFirst);
      if (is_whole) ptx::mbarrier_arrive_expect(v_full, sizeof(KeyTile));
      load_tile(smem.v, a.v, place.batch, place.kv_head, s.key_start + s.first_row, v_full,
                ptx::L2Hint::kEvictFirst);
    }
    key_phase ^= 1;

    // Q, lse, dO and delta of the next step.
    StepWalk walk(place);
    int loaded = 0;
    const auto load_step = [&] {
      if (loaded == steps) return;
      const int head = walk.head, query_tile = walk.query_tile;
      const int stage = ring.stage, row = query_tile * kBlockM, rows = s.query_length - row;
      const bool is_whole = rows >= kBlockM;
      if (is_leader) {
        const int sum = walk.sum(a, place);
        const char* stats =
            reinterpret_cast<char*>(a.plan.stats) + int64_t{sum} * (kPlanStatBytes * kBlockM);
        constexpr uint32_t kTermBytes = 2 * Traits::kTermRows * kBlockM;
        constexpr uint32_t kQBytes = sizeof(QueryTile) + kTermBytes;
        constexpr uint32_t kDoutBytes = sizeof(QueryTile) + kBlockM * sizeof(float);
        ptx::Mbarrier& q_full = is_whole ? smem.q_full[stage] : smem.ragged;
        ptx::Mbarrier& dout_full = is_whole ? smem.dout_full[stage] : smem.ragged;
        ptx::mbarrier_wait(smem.q_empty[stage], ring.phase ^ 1);
        typename Traits::Step& step = smem.steps[stage];
        step.head = head;
        step.row = row;
        step.is_full = place.range.is_full(query_tile);
        step.is_last = loaded + 1 == steps;
        ptx::mbarrier_arrive_expect(q_full, is_whole ? kQBytes : kQBytes + kDoutBytes);
        load_tile(smem.q[stage], a.q, place.batch, head, s.query_start + row, q_full,
                  ptx::L2Hint::kEvictLast);
        load_terms<Traits::kTermRows>(smem.terms[stage], stats, q_full);
        ptx::mbarrier_wait(smem.dout_empty[stage], ring.phase ^ 1);
        if (is_whole) ptx::mbarrier_arrive_expect(dout_full, kDoutBytes);
        load_tile(smem.dout[stage], a.dout, place.batch, head, s.query_start + row, dout_full,
                  ptx::L2Hint::kEvictLast);
        ptx::bulk_load(smem.delta[stage], stats + kTermBytes, kBlockM * sizeof(float), dout_full);
      }
      if (!is_whole) {
        ptx::mbarrier_wait(smem.ragged, ragged_phase);
        ragged_phase ^= 1;
        zero_rows<128>(smem.q[stage], rows);
        zero_rows<128>(smem.dout[stage], rows);
        ptx::fence_async_shared();
        sync();  // The rows are zero before the consumers are told.
        if (is_leader) {
          ptx::mbarrier_arrive(smem.q_full[stage]);
          ptx::mbarrier_arrive(smem.dout_full[stage]);
        }
      }
      ring.advance();
      ++loaded;
      walk.advance(place);
    };
    if (key_rows < kBlockN) {
      ptx::mbarrier_wait(smem.ragged, ragged_phase);
      ragged_phase ^= 1;
      zero_rows<128>(smem.k, key_rows);
      zero_rows<128>(smem.v, key_rows);
      ptx::fence_async_shared();
      sync();  // The rows are zero before the consumers are told.
      if (is_leader) {
        ptx::mbarrier_arrive(smem.k_full);
        ptx::mbarrier_arrive(smem.v_full);
      }
    }
#pragma unroll 1
    for (int i = 0; i < Traits::kStages; ++i) load_step();

    StepWalk dq_walk(place);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int sum = dq_walk.sum(a, place);
      float* const dq = a.plan.dq_sum + int64_t{sum} * (kBlockM * Traits::kHeadDim);
      dq_walk.advance(place);
      ptx::mbarrier_wait(smem.ds_full[ds_ring.stage], ds_ring.phase);
#pragma unroll
      for (int block = 0; block < Traits::kDqBlocks; ++block) {
        const ptx::MatrixDescriptor scores = ptx::MatrixDescriptor(&smem.ds[ds_ring.stage], 0) +
                                             block / kDimBlocks * (ScoreTile::kSlabBytes >> 4);
        const ptx::MatrixDescriptor keys = ptx::MatrixDescriptor(&smem.k, KeyTile::kSlabBytes) +
                                           block % kDimBlocks * (KeyTile::kSlabBytes >> 4);
        float rDQ[8][4];
        multiply_scores<typename Traits::Element, kBlockN, false>(rDQ, scores, keys);
        if (is_leader) ptx::bulk_wait<1, true>();
        sync();  // The copy before the last has read its block: it is free.
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(rDQ);
        if (block == Traits::kDqBlocks - 1) release(smem.ds_empty[ds_ring.stage]);
        float4* out = reinterpret_cast<float4*>(smem.dq[block % 2]) + thread;
#pragma unroll
        for (int n = 0; n < 8; ++n) out[n * 128] = {rDQ[n][0], rDQ[n][1], rDQ[n][2], rDQ[n][3]};
        ptx::fence_async_shared();
        sync();  // The block is written before it is copied.
        if (is_leader) {
          ptx::bulk_reduce_add(dq + block * 4096, smem.dq[block % 2], sizeof(smem.dq[0]));
          ptx::bulk_commit();
        }
      }
      ds_ring.advance();
      load_step();
      if (i == max(steps - 2, 0)) request(t + 1);
    }
  }
  if (is_leader) ptx::bulk_wait<0, false>();  // Shared memory outlives the last copy.
}

}  // namespace jax_flash::attention::sm90
