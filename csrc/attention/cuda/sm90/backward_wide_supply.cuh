// The first two warpgroups of the kernel in backward_wide.cuh: one warp of the first brings the
// operands, the second makes dQ.
#pragma once

#include "attention/cuda/sm90/backward_common.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

// One warp: takes key tiles, walks over their steps and starts all copies.
template <class Traits>
__device__ __forceinline__ void bring_operands(const BackwardArguments& a,
                                               typename Traits::Smem& smem) {
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  const bool is_leader = threadIdx.x == 0;
  Ring<Traits::kStages> ring;
  uint32_t key_phase = 0, ragged_phase = 0;
  int index = static_cast<int>(blockIdx.x);

  // Rows that others own are zeroed before the consumers are told: what lies there could be NaN.
  const auto zero_ragged = [&](auto& x, auto& y, int rows, ptx::Mbarrier& x_full,
                               ptx::Mbarrier& y_full) {
    ptx::mbarrier_wait(smem.ragged, ragged_phase);
    ragged_phase ^= 1;
    zero_rows<32>(x, rows);
    zero_rows<32>(y, rows);
    ptx::fence_async_shared();
    __syncwarp();  // All lanes' rows are zero and fenced.
    release(x_full);
    release(y_full);
  };

  for (int t = 0;; ++t) {
    // NOTE: no sooner, or who has the longest tile also has the next one from the start.
    if (t > 0) {
      if (is_leader) index = atomicAdd(a.next_tile, 1) + static_cast<int>(gridDim.x);
      index = device::uniform(index);
    }
    KeyTilePlace& place = smem.places[t % 2];
    ptx::Mbarrier& place_full = smem.place_full[t % 2];
    ptx::mbarrier_wait(smem.place_empty[t % 2], (t / 2 & 1) ^ 1);
    if (index >= a.num_places) {
      if (is_leader) {
        place.exists = false;
        ptx::mbarrier_arrive(place_full);
      }
      return;
    }
    if (is_leader) {
      ptx::mbarrier_arrive_expect(place_full, sizeof(KeyTilePlace));
      ptx::bulk_load(&place, a.places + index, sizeof(KeyTilePlace), place_full);
    }
    ptx::mbarrier_wait(place_full, t / 2 & 1);
    const int steps = device::uniform(place.num_steps);
    if (steps == 0) continue;
    const Sequence& s = place.sequence;

    const int key_rows = s.key_length - s.first_row;
    const bool has_whole_keys = key_rows >= kBlockN;
    if (is_leader) {
      ptx::mbarrier_wait(smem.k_empty, key_phase ^ 1);
      ptx::Mbarrier& k_full = has_whole_keys ? smem.k_full : smem.ragged;
      ptx::Mbarrier& v_full = has_whole_keys ? smem.v_full : smem.ragged;
      ptx::mbarrier_arrive_expect(k_full, (has_whole_keys ? 1 : 2) * sizeof(KeyTile));
      load_tile(smem.k, a.k, place.batch, place.kv_head, s.key_start + s.first_row, k_full,
                ptx::L2Hint::kEvictFirst);
      if (has_whole_keys) ptx::mbarrier_arrive_expect(v_full, sizeof(KeyTile));
      load_tile(smem.v, a.v, place.batch, place.kv_head, s.key_start + s.first_row, v_full,
                ptx::L2Hint::kEvictFirst);
    }
    __syncwarp();  // The leader has armed the barrier that others now may wait for.
    if (!has_whole_keys) zero_ragged(smem.k, smem.v, key_rows, smem.k_full, smem.v_full);
    key_phase ^= 1;

    int head = place.first_head, query_tile = place.first_tile;
    for (int i = 0; i < steps; ++i) {
      const int stage = ring.stage, row = query_tile * kBlockM, rows = s.query_length - row;
      const bool is_whole = rows >= kBlockM;
      if (is_leader) {
        const int sum = place.query_tile + head * static_cast<int>(a.plan.query_slots) + query_tile;
        const float* stats = reinterpret_cast<float*>(a.plan.stats) + int64_t{sum} * (4 * kBlockM);
        constexpr uint32_t kBytes = sizeof(QueryTile) + kBlockM * sizeof(float);
        ptx::Mbarrier& q_full = is_whole ? smem.q_full[stage] : smem.ragged;
        ptx::Mbarrier& dout_full = is_whole ? smem.dout_full[stage] : smem.ragged;
        ptx::mbarrier_wait(smem.q_empty[stage], ring.phase ^ 1);
        typename Traits::Step& step = smem.steps[stage];
        step.head = head;
        step.row = row;
        step.is_full = place.range.is_full(query_tile);
        step.is_last = i + 1 == steps;
        ptx::mbarrier_arrive_expect(q_full, (is_whole ? 1 : 2) * kBytes);
        load_tile(smem.q[stage], a.q, place.batch, head, s.query_start + row, q_full,
                  ptx::L2Hint::kEvictLast);
        ptx::bulk_load(smem.lse[stage], stats, kBlockM * sizeof(float), q_full);
        ptx::mbarrier_wait(smem.dout_empty[stage], ring.phase ^ 1);
        if (is_whole) ptx::mbarrier_arrive_expect(dout_full, kBytes);
        load_tile(smem.dout[stage], a.dout, place.batch, head, s.query_start + row, dout_full,
                  ptx::L2Hint::kEvictLast);
        ptx::bulk_load(smem.delta[stage], stats + kBlockM, kBlockM * sizeof(float), dout_full);
      }
      __syncwarp();  // As above.
      if (!is_whole) {
        zero_ragged(smem.q[stage], smem.dout[stage], rows, smem.q_full[stage],
                    smem.dout_full[stage]);
      }
      ring.advance();
      if (++query_tile == place.range.end) {
        query_tile = place.range.begin;
        ++head;
      }
    }
  }
}

// One warpgroup: dQ = dS K, in blocks of 64 queries x 64 dims, added to the sums from registers:
// shared memory is full.
template <class Traits>
__device__ __forceinline__ void make_dq(const BackwardArguments& a, typename Traits::Smem& smem) {
  using KeyTile = typename Traits::KeyTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kBlocks = Traits::kHeadDim / 64;
  static_assert(kBlockM == 64);
  const int thread = threadIdx.x % 128;
  Ring<2> ring;
  for (int t = 0;; ++t) {
    ptx::mbarrier_wait(smem.place_full[t % 2], t / 2 & 1);
    const KeyTilePlace& place = smem.places[t % 2];
    if (!device::uniform(place.exists)) break;
    const int steps = device::uniform(place.num_steps);
    int head = place.first_head, query_tile = place.first_tile;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int sum = place.query_tile + head * static_cast<int>(a.plan.query_slots) + query_tile;
      float* const dq = place.dq_sum + int64_t{sum} * (kBlockM * Traits::kHeadDim);
      if (++query_tile == place.range.end) {
        query_tile = place.range.begin;
        ++head;
      }
      ptx::mbarrier_wait(smem.ds_full[ring.stage], ring.phase);
      const ptx::MatrixDescriptor ds = ptx::MatrixDescriptor(&smem.ds[ring.stage], 0);
#pragma unroll 1
      for (int block = 0; block < kBlocks; ++block) {
        const ptx::MatrixDescriptor keys = ptx::MatrixDescriptor(&smem.k, KeyTile::kSlabBytes) +
                                           block * (KeyTile::kSlabBytes >> 4);
        float rDQ[8][4];
        ptx::wgmma_pin(rDQ);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBlockN / 16; ++k) {
          ptx::wgmma<typename Traits::Element, true, true>(rDQ, ds + k * ptx::kRows16,
                                                           keys + k * ptx::kRows16, k > 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(rDQ);
        if (block == kBlocks - 1) release(smem.ds_empty[ring.stage]);
        float* const target = dq + block * 4096;
#pragma unroll
        for (int n = 0; n < 8; ++n) ptx::red_add_4(target + (n * 128 + thread) * 4, rDQ[n]);
      }
      ring.advance();
    }
    __syncwarp();  // All lanes have left the place.
    release(smem.place_empty[t % 2]);
  }
}

}  // namespace jax_flash::attention::sm90
