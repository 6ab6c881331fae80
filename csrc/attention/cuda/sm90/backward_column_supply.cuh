// The first warpgroup of the kernel in backward_column.cuh.
#pragma once

#include "attention/cuda/sm90/backward_common.cuh"
#include "attention/cuda/sm90/backward_steps.cuh"
#include "attention/cuda/sm90/backward_terms.cuh"
#include "device/element.cuh"
#include "device/opaque.cuh"
#include "device/warp.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

// Writes a warpgroup's accumulators of 64 rows x 64 dims, times `scale`, as the first `rows` x
// `cols` at `destination`. NOTE: with shuffles, to store 16 bytes at a time, ptxas serialises the
// consumers' wgmma (C7512).
template <typename Element>
__device__ __forceinline__ void store_block(const float (&rD)[8][4], float scale,
                                            Element* destination, int64_t row_stride, int rows,
                                            int cols) {
  const int thread = device::thread_index() % 128, first_row = thread / 32 * 16 + thread % 32 / 4;
  const int first_col = 2 * (thread % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half;
    if (row >= rows) continue;
    Element* const out = destination + row * row_stride + first_col;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (8 * n < cols) {
        *reinterpret_cast<uint32_t*>(out + 8 * n) =
            device::pack<Element>(rD[n][2 * half] * scale, rD[n][2 * half + 1] * scale);
      }
    }
  }
}

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
  constexpr int kPlaces = Traits::kPlaces, kSteps = Traits::kSteps;
  // NOTE: what only the first warp needs is in shared memory, or computed again: dQ needs the
  // registers. All its lanes walk along with the one that is elected for the copies, or ptxas takes
  // the descriptors of dQ for what differs between lanes, and every wgmma waits for moves of them.
  const bool is_first_warp = device::uniform(static_cast<int>(threadIdx.x) / 32) == 0;
  typename Traits::Cursor& next = smem.next;

  // Asks for place `t`.
  const auto request = [&](int t, int index) {
    ptx::Mbarrier& full = smem.place_full[t % kPlaces];
    ptx::mbarrier_arrive_expect(full, sizeof(KeyTilePlace));
    ptx::bulk_load(&smem.places[t % kPlaces], a.places + index, sizeof(KeyTilePlace), full);
  };
  // Starts the copies of K and V of key tile `t`, and asks for the place after it. Four places are
  // in use: dQ of key tile t - 2 is made, so that nobody is at t - 3 any more.
  static_assert(kPlaces == 4);
  const auto load_keys = [&](int t) {
    ptx::mbarrier_wait(smem.place_full[t % kPlaces], t / kPlaces & 1);
    const KeyTilePlace& place = smem.places[t % kPlaces];
    if (ptx::elect_one()) {
      if (place.next < a.num_places) {
        request(t + 1, place.next);
      } else {
        next.end = t + 1;
      }
      ptx::Mbarrier& full = smem.keys_full[t % 2];
      const int row = place.sequence.first_row;
      ptx::mbarrier_arrive_expect(full, 2 * sizeof(KeyTile));
      load_tile(smem.k[t % 2], a.k, place.batch, place.kv_head, row, full,
                ptx::L2Hint::kEvictFirst);
      load_tile(smem.v[t % 2], a.v, place.batch, place.kv_head, row, full,
                ptx::L2Hint::kEvictFirst);
    }
    __syncwarp();  // `end` is written.
  };
  // Starts the copies of step `i`, if there is one. NOTE: rows past the end of the arrays come as
  // zeros.
  const auto load_step = [&](int i) {
    int t = next.key_tile, left = next.steps, head = next.head, query_tile = next.query_tile;
    const bool is_first = left == 0;
    if (is_first) ++t;
    if (t == next.end) return;
    const KeyTilePlace& place = smem.places[t % kPlaces];
    if (is_first) {
      ptx::mbarrier_wait(smem.place_full[t % kPlaces], t / kPlaces & 1);
      left = place.num_steps;
      head = 0;
      query_tile = place.first_tile;
    }
    const int stage = i % 2, row = query_tile * kBlockM, q_head = place.first_head + head;
    const int query_slots = static_cast<int>(a.plan.query_slots);
    const int64_t tile = place.query_tile + q_head * query_slots + query_tile;
    ptx::Mbarrier &q_full = smem.q_full[stage], &dout_full = smem.dout_full[stage];
    constexpr uint32_t kTermBytes = 2 * Traits::kTermRows * kBlockM;
    constexpr uint32_t kDeltaBytes = kBlockM * sizeof(float);
    const char* stats = reinterpret_cast<char*>(a.plan.stats) + tile * (kPlanStatBytes * kBlockM);
    const bool completes = query_tile < place.end_of_complete;
    ptx::mbarrier_wait(smem.q_empty[stage], (i / 2 & 1) ^ 1);
    if (ptx::elect_one()) {
      typename Traits::Step& step = smem.steps[i % kSteps];
      step.sum = next.sums + int64_t{head * query_slots + query_tile} * (kBlockM * 64);
      step.key_tile = t;
      step.head = q_head;
      step.row = row;
      step.is_full = place.range.is_full(query_tile);
      step.is_last = left == 1;
      step.is_end = left == 1 && place.next >= a.num_places;
      step.begins_sum = query_tile >= place.first_unseen;
      step.completes_sum = completes;
      const ptx::L2Hint hint = completes ? ptx::L2Hint::kEvictFirst : ptx::L2Hint::kEvictNormal;
      ptx::mbarrier_arrive_expect(q_full, sizeof(QueryTile) + kTermBytes);
      load_tile(smem.q[stage], a.q, place.batch, q_head, row, q_full, hint);
      load_terms<Traits::kTermRows>(smem.terms[stage], stats, q_full);
    }
    ptx::mbarrier_wait(smem.dout_empty[stage], (i / 2 & 1) ^ 1);
    if (ptx::elect_one()) {
      const ptx::L2Hint hint = completes ? ptx::L2Hint::kEvictFirst : ptx::L2Hint::kEvictNormal;
      ptx::mbarrier_arrive_expect(dout_full, sizeof(QueryTile) + kDeltaBytes);
      load_tile(smem.dout[stage], a.dout, place.batch, q_head, row, dout_full, hint);
      ptx::bulk_load(smem.delta[stage], stats + kTermBytes, kDeltaBytes, dout_full);
      const bool is_last_tile = query_tile + 1 == place.range.end;
      next.key_tile = t;
      next.steps = left - 1;
      next.query_tile = is_last_tile ? place.range.begin : query_tile + 1;
      next.head = is_last_tile ? head + 1 : head;
    }
    __syncwarp();  // The cursor is written.
  };

  if (is_first_warp) {
    if (ptx::elect_one()) {
      const int group = static_cast<int>(a.p.heads) / static_cast<int>(a.p.kv_heads);
      next = {.sums = a.plan.dq_sum + static_cast<int64_t>(blockIdx.x) * group *
                                          a.plan.query_slots * (kBlockM * Traits::kHeadDim),
              .key_tile = -1,
              .steps = 0,
              .end = -1};
      request(0, static_cast<int>(blockIdx.x * a.plan.key_slots));
    }
    __syncwarp();  // The cursor is written.
    load_keys(0);
    load_step(0);
    if (next.end != 1) load_keys(1);
    load_step(1);
  }
  // Step after step: dQ, and, under its second half, the copies of the second step after it.
#pragma unroll 1
  for (int i = 0;; ++i) {
    const int stage = i % 2;
    const typename Traits::Step& step = smem.steps[i % kSteps];
    ptx::mbarrier_wait(smem.q_full[stage], i / 2 & 1);
    const bool begins = device::uniform(step.begins_sum);
    const bool completes = device::uniform(step.completes_sum);
    const int key_buffer = device::uniform(step.key_tile) % 2;
#pragma unroll
    for (int block = 0; block < kBlockM / 64; ++block) {
      float* const sum = step.sum + block * 4096 + 4 * threadIdx.x;
      float rDQ[8][4] = {};
      if (completes && !begins) {
#pragma unroll
        for (int n = 0; n < 8; ++n) ptx::load_relaxed_4(sum + n * 512, rDQ[n]);
      }
      if (block == 0) ptx::mbarrier_wait(smem.ds_full[stage], i / 2 & 1);
      const ptx::MatrixDescriptor ds =
          ptx::MatrixDescriptor(&smem.ds[stage], 0) + block * (ScoreTile::kSlabBytes >> 4);
      const ptx::MatrixDescriptor k = ptx::MatrixDescriptor(&smem.k[0], KeyTile::kSlabBytes) +
                                      key_buffer * (sizeof(KeyTile) >> 4);
      multiply_scores<Element, kBlockN, true>(rDQ, ds, k);
      if (block == kBlockM / 64 - 1 && is_first_warp) load_step(i + 2);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(rDQ);
      if (block == kBlockM / 64 - 1) release(smem.ds_empty[stage]);
      if (completes) {
        const KeyTilePlace& place = smem.places[step.key_tile % kPlaces];
        const int row = step.row + 64 * block;
        store_block<Element>(
            rDQ, a.p.scale, element_pointer<Element>(a.p.dq, place.batch, row, step.head),
            a.p.dq.row_stride, static_cast<int>(a.p.seq_q) - row, static_cast<int>(a.p.head_dim));
      } else if (begins) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          *reinterpret_cast<float4*>(sum + n * 512) = {rDQ[n][0], rDQ[n][1], rDQ[n][2], rDQ[n][3]};
        }
      } else {
#pragma unroll
        for (int n = 0; n < 8; ++n) ptx::red_add_4(sum + n * 512, rDQ[n]);
      }
    }
    if (device::uniform(step.is_end)) break;
    if (is_first_warp && device::uniform(step.is_last)) {
      ptx::mbarrier_wait(smem.ds_empty[stage], i / 2 & 1);  // All warps have read K.
      const int t = device::uniform(step.key_tile) + 2;
      if (t != next.end) load_keys(t);
    }
  }
}

}  // namespace jax_flash::attention::sm90
