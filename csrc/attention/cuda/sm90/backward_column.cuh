// The Hopper backward of short sequences at head dims up to 64: a CTA takes a whole column (batch
// entry, kv head), key tile after key tile, so that the sums of dQ are its own. They stay in L2,
// begin with a store and end as dQ: no zeros, no finish. K and V have two buffers and the operands
// come two steps ahead, so that a key tile begins while the one before it ends. As in
// backward_supplier.cuh the first warpgroup brings the operands and makes dQ.
// docs/kernels/hopper_backward.md.
#pragma once

#include "attention/cuda/sm90/backward_column_supply.cuh"
#include "attention/cuda/sm90/backward_consumer.cuh"
#include "attention/cuda/sm90/backward_mask.cuh"
#include "attention/cuda/sm90/backward_supplied.cuh"
#include "device/opaque.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

template <typename Element_>
struct ColumnTraits {
  using Element = Element_;
  static constexpr int kHeadDim = 64;
  static constexpr bool kHasDropout = false;
  static constexpr int kBlockM = 128;  // queries of a step
  static constexpr int kBlockN = 128;  // keys of a tile, 64 a warpgroup
  static constexpr int kStages = 2;    // Q, dO and dS tiles in shared memory
  // Step i + 2 is described while the slowest of those who make dQ is at the end of step i - 2.
  static constexpr int kSteps = 8;
  static constexpr int kPlaces = 4;  // see supply_column
  static constexpr int kConsumers = 2, kConsumerThreads = 128 * kConsumers;
  static constexpr int kTermRows = kTermParts;  // of S
  static constexpr bool kAddsInOrder = true;    // to dQ
  static constexpr bool kStoresFirst = false;   // see column_step
  static constexpr int kClusterSize = 1, kThreads = 128 + kConsumerThreads;
  // 3 x 168 registers a thread of each warpgroup's rank at launch.
  static constexpr int kSupplierRegisters = 72, kConsumerRegisters = 216;

  using KeyTile = device::SharedTile<kBlockN, kHeadDim>;
  using QueryTile = device::SharedTile<kBlockM, kHeadDim>;
  using ScoreTile = device::SharedTile<kBlockN, kBlockM>;  // dS^T
  using GradientTile = device::SharedTile<64, kHeadDim>;   // a warpgroup's dK or dV

  struct Step {
    float* sum;  // of dQ
    int key_tile, head, row;
    bool is_full, is_last, is_end;   // of the key tile, of the CTA
    bool begins_sum, completes_sum;  // the first, the last key tile that these queries see
  };
  // The next step to be loaded.
  struct Cursor {
    float* sums;                            // of dQ, the CTA's
    int key_tile, steps, head, query_tile;  // steps: what is left of the key tile
    int end;                                // key tiles, as soon as that is known
  };
  struct Smem {
    KeyTile k[2], v[2];  // of two key tiles
    QueryTile q[kStages], dout[kStages];
    TermTile<kBlockM> terms[kStages];
    ScoreTile ds[kStages];
    GradientTile gradients[kConsumers];  // dV, then dK, on their way out
    float delta[kStages][kBlockM];       // in the order of stats_index
    Weights weights;
    Step steps[kSteps];
    Cursor next;
    KeyTilePlace places[kPlaces];
    ptx::Mbarrier place_full[kPlaces], keys_full[2];
    ptx::Mbarrier q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    ptx::Mbarrier ds_full[kStages], ds_empty[kStages];
  };
  static_assert(sizeof(Smem) <= 227 * 1024);
};

template <typename Element>
inline constexpr bool kTakesColumns<ColumnTraits<Element>> = true;

template <class Traits>
__device__ __forceinline__ void initialise_column_barriers(typename Traits::Smem& smem) {
  constexpr uint32_t kWarps = 4 * Traits::kConsumers;
  for (auto& place_full : smem.place_full) ptx::mbarrier_init(place_full, 1);
  for (auto& keys_full : smem.keys_full) ptx::mbarrier_init(keys_full, 1);
  for (int i = 0; i < Traits::kStages; ++i) {
    ptx::mbarrier_init(smem.q_full[i], 1);
    ptx::mbarrier_init(smem.q_empty[i], kWarps);
    ptx::mbarrier_init(smem.dout_full[i], 1);
    ptx::mbarrier_init(smem.dout_empty[i], kWarps);
    ptx::mbarrier_init(smem.ds_full[i], kWarps);
    ptx::mbarrier_init(smem.ds_empty[i], 4);
  }
  ptx::fence_barrier_init();
}

// Writes a warp's 16 rows of dK or dV, times `scale`, through its part of a tile of shared memory,
// at row `row` of its tile's array. NOTE: what lies past the end of the array is left out.
template <typename Element, typename Tile, int kN>
__device__ __forceinline__ void store_warp_gradient(Tile& tile, const float (&rD)[kN][4],
                                                    float scale, const OperandMap& map,
                                                    const BatchIndex& batch, int head, int row) {
  const int thread = device::thread_index() % 128, lane = thread % 32;
  const int warp_row = thread / 32 * 16;
  using Address = device::LdmatrixAddress<Tile>;
  if (lane == 0) ptx::bulk_wait<0, true>();
  __syncwarp();  // The copy before has read the rows.
  stage_gradient<Element, Tile>(Address(tile, Address::Order::kRowsFirst, warp_row, lane), rD,
                                scale);
  ptx::fence_async_shared();
  __syncwarp();  // The rows are written and fenced before they are copied.
  if (lane == 0) {
    ptx::tma_store(map.map, reinterpret_cast<char*>(tile.data) + warp_row * Tile::kRowBytes, 0,
                   row + warp_row, head, map.batch(batch.axis));
    ptx::bulk_commit();
  }
}

template <class Traits>
__device__ __forceinline__ void consume_column(const BackwardArguments& a,
                                               typename Traits::Smem& smem, int consumer) {
  using Element = typename Traits::Element;
  using KeyTile = typename Traits::KeyTile;
  using ScoreTile = typename Traits::ScoreTile;
  constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;
  constexpr int kPlaces = Traits::kPlaces;
  const int warp_row = 64 * consumer + threadIdx.x % 128 / 32 * 16;  // of the key tile
  const float scale_log2 = a.p.scale * 1.4426950408889634f;

  // S^T and dP^T of this warpgroup's 64 keys.
  const auto own_keys = [&](const KeyTile& keys) {
    return ptx::MatrixDescriptor(&keys, 0) + consumer * (4 * ptx::kRows16);
  };
  float rS[kBlockM / 8][4], rDP[kBlockM / 8][4];
  uint32_t rP[kBlockM / 16][4], rDS[kBlockM / 16][4];
  float rDK[kHeadDim / 8][4] = {}, rDV[kHeadDim / 8][4] = {};
  const auto multiply_keys_queries = [&](int t, int stage) {
    add_terms<Element, 0>(rS, smem.terms[stage], smem.weights);
    multiply_keys<Element, KeyTile, true>(rS, own_keys(smem.k[t % 2]), smem.q[stage]);
    ptx::wgmma_commit();
  };
  const auto wait_for_keys = [&](int t) {
    ptx::mbarrier_wait(smem.place_full[t % kPlaces], t / kPlaces & 1);
    ptx::mbarrier_wait(smem.keys_full[t % 2], t / 2 & 1);
  };
  const auto store = [&](const KeyTilePlace& place, const float (&rD)[kHeadDim / 8][4], float scale,
                         const OperandMap& map) {
    const int consumer = device::thread_index() / 128 - 1;
    store_warp_gradient<Element>(smem.gradients[consumer], rD, scale, map, place.batch,
                                 place.kv_head, place.sequence.first_row + 64 * consumer);
  };

  Ring<Traits::kStages> ring;
  wait_for_keys(0);
  ptx::mbarrier_wait(smem.q_full[0], 0);
  ptx::wgmma_pin(rDK);
  ptx::wgmma_pin(rDV);
  multiply_keys_queries(0, 0);
  for (int t = 0, i = 0;; ++i) {  // key tiles and steps of the CTA
    // In flight: S.
    const int stage = ring.stage;
    const KeyTilePlace& place = smem.places[t % kPlaces];
    const typename Traits::Step& step = smem.steps[i % Traits::kSteps];
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(rS);
    if (!step.is_full) {
      const Sequence& s = place.sequence;
      mask_scores(rS, s, s.first_row + warp_row, step.row);
    }
    exponentiate<Element, false>(rS, rP, scale_log2);
    ptx::mbarrier_wait(smem.dout_full[stage], ring.phase);
    multiply_keys<Element, KeyTile, false>(rDP, own_keys(smem.v[t % 2]), smem.dout[stage]);
    ptx::wgmma_commit();
    accumulate<Element>(rDV, rP, smem.dout[stage]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::wgmma_pin(rDP);
    // dP -> dS, while dV runs.
    ptx::mbarrier_wait(smem.ds_empty[stage], ring.phase ^ 1);
    // NOTE: the thread's index is read again, or the address is kept, and spilled.
    const int thread = device::thread_index();
    const device::LdmatrixAddress<ScoreTile> ds_address(
        smem.ds[stage], device::LdmatrixAddress<ScoreTile>::Order::kRowsFirst,
        thread / 32 * 16 - 64, thread % 32);
#pragma unroll
    for (int j = 0; j < kBlockM / 16; ++j) {
      differentiate<Element>(rDP, rP[j], smem.delta[stage], j, rDS[j]);
      ptx::stmatrix_x4(ds_address(0, 16 * j), rDS[j]);
    }
    const bool is_last = step.is_last, is_end = step.is_end;
    // dK, issued before the fence that waits for the stores, and the next step's S behind it.
    accumulate<Element>(rDK, rDS, smem.q[stage]);
    ptx::wgmma_commit();
    ptx::fence_async_shared();
    __syncwarp();  // All lanes' elements are written and fenced, and the step has been read.
    release(smem.ds_full[stage]);
    ptx::wgmma_wait<1>();
    ptx::wgmma_pin(rDV);
    release(smem.dout_empty[stage]);
    ring.advance();
    if (is_last) store(place, rDV, 1.0f, a.dv);  // under dK
    // The next key tile's S runs while this one's dV and dK leave. NOTE: in the end a product of
    // what lies there, which no one reads: ptxas wants the same in flight on all paths.
    const int next = is_last ? t + 1 : t;
    if (!is_end) {
      if (is_last) wait_for_keys(next);
      ptx::mbarrier_wait(smem.q_full[ring.stage], ring.phase);
    }
    multiply_keys_queries(next, ring.stage);
    ptx::wgmma_wait<1>();
    ptx::wgmma_pin(rDK);
    release(smem.q_empty[stage]);
    if (is_last) {
      store(place, rDK, a.p.scale, a.dk);
      if (is_end) break;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rDK[n][e] = rDV[n][e] = 0.0f;
      }
      t = next;
    }
  }
  ptx::wgmma_wait<0>();
  if (threadIdx.x % 32 == 0) ptx::bulk_wait<0, false>();  // Shared memory outlives the last copy.
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    column_kernel(const __grid_constant__ BackwardArguments a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(shared);
  run_supplied<Traits>(
      smem, [&] { initialise_column_barriers<Traits>(smem); },
      [&] { supply_column<Traits>(a, smem); },
      [&](int consumer) { consume_column<Traits>(a, smem, consumer); });
}

}  // namespace jax_flash::attention::sm90
