// dV = P^T dO,  dK = scale dS^T Q,  dQ += dS K   with   P = exp(scale Q K^T - lse),
//                                                       dS = P * (dO V^T - delta)
// on TMA and wgmma. Called by launch_backward.cu (backward_launch.cuh) between prepare (lse and
// delta of every row, dQ zeroed) and finish (dQ to 16 bits).
//
// A CTA takes key tiles one after another: K and V stay in shared memory, dK and dV in registers of
// two warpgroups, and the query tiles of every head of the group pass by, brought by a producer
// warp. S and dP are computed transposed, keys as rows, so that P^T and dS^T are register operands
// of dV and dK; dS alone crosses shared memory, for dQ, which the copy engine adds to global
// memory. docs/kernels/hopper_backward.md shows who waits for whom.
#pragma once

#include "attention/cuda/sm90/backward_consumer.cuh"
#include "attention/cuda/sm90/backward_dropout.cuh"
#include "attention/cuda/sm90/backward_mask.cuh"
#include "attention/cuda/sm90/backward_producer.cuh"
#include "device/opaque.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

template <typename Element_, int kHeadDim_, int kBlockM_, int kStages_, bool kHasDropout_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr bool kHasDropout = kHasDropout_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;  // queries of a step
  static constexpr int kBlockN = 128;       // keys of the CTA, 64 a warpgroup
  static constexpr int kStages = kStages_;  // Q and dO tiles in shared memory
  static constexpr int kConsumers = 2, kConsumerThreads = 128 * kConsumers;
  static constexpr int kTermRows = 2 * kTermParts;  // of S and of dP
  static constexpr bool kAddsInOrder = true;        // to dQ, where deterministic
  static constexpr bool kStoresFirst = true;        // the first key tile begins the sum
  static constexpr int kClusterSize = 1, kThreads = 128 + kConsumerThreads;
  // 3 x 168 registers a thread of each warpgroup's rank at launch.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  // dQ is cut into blocks of 64 queries x 64 dims, one a warpgroup.
  static_assert(kBlockM / 64 * (kHeadDim / 64) == kConsumers);

  using KeyTile = device::SharedTile<kBlockN, kHeadDim>;
  using QueryTile = device::SharedTile<kBlockM, kHeadDim>;
  using ScoreTile = device::SharedTile<kBlockN, kBlockM>;  // dS^T
  using GradientTile = device::SharedTile<64, kHeadDim>;   // a warpgroup's dK or dV

  // What consumers must know of a step.
  struct Step {
    int head, row;
    bool is_full, is_last;
  };
  // What those who add to dQ must know, in a ring as well: while they have not handed back a block,
  // the consumers keep the stage of the step after the next, and the producer is two further on.
  static constexpr int kTargets = 2 * kStages;
  struct Smem {
    KeyTile k[2], v;  // K of the next tile as well
    QueryTile q[kStages], dout[kStages];
    TermTile<kBlockM> terms[kStages];
    ScoreTile ds[2];                // in the end: dK and dV on their way out
    Weights weights;
    float dq[kConsumers][64 * 64];  // a warpgroup's block of dQ, [n][thread][4]
    // -delta in 16 bits, where dropout leaves nothing else of dP, in the order of stats_index.
    alignas(16) uint32_t minus_delta[kStages][kHasDropout ? kBlockM / 2 : 1];
    Step steps[kStages];
    DqTarget targets[kTargets];
    bool is_end[kConsumers];  // for those who add to dQ: no block, that was all
    KeyTilePlace places[2];
    ptx::Mbarrier place_full[2], place_empty[2], k_full[2], k_empty[2], v_full, v_empty;
    ptx::Mbarrier q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    ptx::Mbarrier ds_full[2], dq_full[kConsumers], dq_empty[kConsumers];
  };
  static_assert(sizeof(GradientTile) * kConsumers <= sizeof(ScoreTile) * 2);
  static_assert(sizeof(Smem) <= 227 * 1024);
};

template <class Traits>
__device__ __forceinline__ void initialise_barriers(typename Traits::Smem& smem) {
  constexpr uint32_t kWarps = 4 * Traits::kConsumers;
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(smem.place_full[i], 1);
    ptx::mbarrier_init(smem.place_empty[i], Traits::kConsumerThreads);
    ptx::mbarrier_init(smem.ds_full[i], kWarps);
    ptx::mbarrier_init(smem.k_full[i], 1);
    ptx::mbarrier_init(smem.k_empty[i], kWarps);
  }
  ptx::mbarrier_init(smem.v_full, 1);
  ptx::mbarrier_init(smem.v_empty, kWarps);
  for (int i = 0; i < Traits::kStages; ++i) {
    ptx::mbarrier_init(smem.q_full[i], 1);
    ptx::mbarrier_init(smem.q_empty[i], kWarps * kWarpLanes);  // with the step
    ptx::mbarrier_init(smem.dout_full[i], 1);
    ptx::mbarrier_init(smem.dout_empty[i], kWarps * (Traits::kHasDropout ? kWarpLanes : 1));
  }
  for (int i = 0; i < Traits::kConsumers; ++i) {
    smem.is_end[i] = false;
    ptx::mbarrier_init(smem.dq_full[i], 4);
    ptx::mbarrier_init(smem.dq_empty[i], 1);
  }
  ptx::fence_barrier_init();
}

enum class ConsumerBarrier { kBoth = 1, kOwn = 2 };  // kOwn + consumer

template <class Traits>
__device__ __forceinline__ void consume(const BackwardArguments& a, typename Traits::Smem& smem,
                                        int consumer) {
  using Element = typename Traits::Element;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using ScoreTile = typename Traits::ScoreTile;
  using GradientTile = typename Traits::GradientTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kHeadDim = Traits::kHeadDim;
  const int thread = threadIdx.x % 128;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16 - 64;  // of the key tile
  const float scale_log2 = a.p.scale * 1.4426950408889634f;

  const auto sync_consumers = [] {
    ptx::named_barrier_sync(static_cast<int>(ConsumerBarrier::kBoth), Traits::kConsumerThreads);
  };

  // S^T and dP^T of this warpgroup's 64 keys.
  const auto own_keys = [&](const KeyTile& keys) {
    return ptx::MatrixDescriptor(&keys, 0) + device::opaque(consumer) * (4 * ptx::kRows16);
  };
  const auto multiply_keys_queries = [&](float (&rS)[kBlockM / 8][4], int key_stage, int stage) {
    add_terms<Element, 0>(rS, smem.terms[stage], smem.weights);
    multiply_keys<Element, KeyTile, true>(rS, own_keys(smem.k[key_stage]), smem.q[stage]);
    ptx::wgmma_commit();
  };
  const auto multiply_values_gradients = [&](float (&rDP)[kBlockM / 8][4], int stage) {
    add_terms<Element, 1>(rDP, smem.terms[stage], smem.weights);
    multiply_keys<Element, KeyTile, true>(rDP, own_keys(smem.v), smem.dout[stage]);
    ptx::wgmma_commit();
  };
  // This warpgroup's 64 x 64 block of dS K.
  const auto make_dq = [&](float (&rDQ)[8][4], const ScoreTile& ds, int key_stage) {
    const int query_slab = kBlockM > 64 ? consumer : 0,
              dim_slab = kHeadDim > 64 ? device::opaque(consumer) : 0;
    multiply_scores<Element, kBlockN, false>(
        rDQ, ptx::MatrixDescriptor(&ds, 0) + query_slab * (ScoreTile::kSlabBytes >> 4),
        ptx::MatrixDescriptor(&smem.k[key_stage], 0) + dim_slab * (KeyTile::kSlabBytes >> 4));
  };

  Ring<Traits::kStages> ring;
  Ring<2> ds_ring, keys;  // the stage of `keys` is the phase of V as well
  uint32_t dq_phase = 0;
  float rS[kBlockM / 8][4];

  const auto wait_for_queries = [&](const Sequence& s, QueryTile& queries, ptx::Mbarrier& full) {
    ptx::mbarrier_wait(full, ring.phase);
    if (const int rows = s.query_length - smem.steps[ring.stage].row; rows < kBlockM) {
      zero_rows<Traits::kConsumerThreads>(queries, rows);
      ptx::fence_async_shared();
      sync_consumers();  // The rows are zero before any wgmma reads them.
    }
  };
  const auto wait_for_keys = [&](const Sequence& s, KeyTile& tile, ptx::Mbarrier& full,
                                 uint32_t phase) {
    ptx::mbarrier_wait(full, phase);
    if (const int rows = s.key_length - s.first_row; rows < kBlockN) {
      zero_rows<Traits::kConsumerThreads>(tile, rows);
      ptx::fence_async_shared();
      sync_consumers();  // The rows are zero before any wgmma reads them.
    }
  };
  // Starts S of the first step of the CTA's t-th place. NOTE: where it has none, a product of what
  // lies there, which no one reads: ptxas wants the same in flight on all paths.
  const auto begin_tile = [&](int t) {
    ptx::mbarrier_wait(smem.place_full[t % 2], t / 2 & 1);
    const KeyTilePlace& place = smem.places[t % 2];
    if (place.exists && place.num_steps > 0) {
      const Sequence& s = place.sequence;
      wait_for_keys(s, smem.k[keys.stage], smem.k_full[keys.stage], keys.phase);
      wait_for_queries(s, smem.q[ring.stage], smem.q_full[ring.stage]);
    }
    multiply_keys_queries(rS, keys.stage, ring.stage);
  };
  begin_tile(0);
  for (int t = 0;; ++t) {
    // In flight: S.
    const KeyTilePlace& place = smem.places[t % 2];
    if (!place.exists) break;
    const Sequence& s = place.sequence;

    float rDK[kHeadDim / 8][4] = {}, rDV[kHeadDim / 8][4] = {};
    if (place.num_steps == 0) {
      begin_tile(t + 1);
    } else {
      float rDP[kBlockM / 8][4], rDQ[8][4];
      uint32_t rP[kBlockM / 16][4], rDS[kBlockM / 16][4];
      DroppedBits dropped[kBlockM / 64];  // with dropout, of the step whose P is next
      // S of a step -> P in 16 bits.
      const auto make_probabilities = [&] {
        const typename Traits::Step& step = smem.steps[ring.stage];
        ptx::wgmma_pin(rS);
        if (!step.is_full) {
          mask_scores(rS, s, BlockMask(a.p.mask, place.batch, step.head), s.first_row + warp_row,
                      step.row);
        }
        exponentiate<Element, Traits::kHasDropout>(rS, rP, scale_log2);
      };
      // What is dropped of the step of `head` and `row`.
      const auto draw = [&](int head, int row) {
        if constexpr (Traits::kHasDropout) {
          const DropoutWords words = place.dropout;
          dropped[0] = draw_dropped<4>(words, a.p.dropout.head_ids[head], a.p.dropout.threshold,
                                       row, s.first_row + warp_row);
        }
      };
      // Writes the finished block of dQ, and hands it to the thread that adds it to the sums.
      const auto write_dq = [&] {
        ptx::wgmma_pin(rDQ);
        ptx::mbarrier_wait(smem.dq_empty[consumer], dq_phase ^ 1);
        dq_phase ^= 1;
        float4* block = reinterpret_cast<float4*>(smem.dq[consumer]) + thread;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          block[n * 128] = {rDQ[n][0], rDQ[n][1], rDQ[n][2], rDQ[n][3]};
        }
      };
      const auto send_dq = [&] {
        ptx::fence_async_shared();
        __syncwarp();  // All lanes' elements are written and fenced.
        release(smem.dq_full[consumer]);
      };

      ptx::wgmma_pin(rDK);
      ptx::wgmma_pin(rDV);
      draw(place.first_head, place.first_tile * kBlockM);
      wait_for_keys(s, smem.v, smem.v_full, keys.stage);
      wait_for_queries(s, smem.dout[ring.stage], smem.dout_full[ring.stage]);
      ptx::wgmma_wait<0>();
      make_probabilities();
      multiply_values_gradients(rDP, ring.stage);

      bool dq_is_written = false;
      while (true) {
        // In flight: dP. dV runs while dP becomes dS.
        const int stage = ring.stage;
        uint32_t rKept[kBlockM / 16][4];
        accumulate_kept<Element, Traits::kHasDropout>(rDV, rP, dropped, rKept, smem.dout[stage]);
        ptx::wgmma_commit();
        if (dq_is_written) send_dq();  // the last step's; the fence waits under dP
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(rDP);
        ScoreTile& ds = smem.ds[ds_ring.stage];
        const device::LdmatrixAddress<ScoreTile> ds_address(
            ds, device::LdmatrixAddress<ScoreTile>::Order::kRowsFirst, warp_row);
#pragma unroll
        for (int j = 0; j < kBlockM / 16; ++j) {
          if constexpr (Traits::kHasDropout) {
            differentiate<Element>(rDP, rP[j], rKept[j],
                                   load_minus_delta(smem.minus_delta[stage], j), j, rDS[j]);
          } else {
            differentiate<Element>(rDP, rP[j], j, rDS[j]);
          }
          ptx::stmatrix_x4(ds_address(0, 16 * j), rDS[j]);
        }
        // dK, issued before the fence that waits for the stores, and the next step's S behind it.
        accumulate<Element>(rDK, rDS, smem.q[stage]);
        ptx::wgmma_commit();
        ptx::fence_async_shared();
        __syncwarp();  // All lanes' elements are written and fenced.
        release(smem.ds_full[ds_ring.stage]);
        const bool is_last = smem.steps[stage].is_last;
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(rDV);
        if constexpr (Traits::kHasDropout) {  // with delta
          release_read(smem.dout_empty[stage]);
        } else {
          release(smem.dout_empty[stage]);
        }
        ring.advance();
        if (is_last) {
          release(smem.v_empty);
          ptx::mbarrier_wait(smem.ds_full[ds_ring.stage], ds_ring.phase);
          const int key_stage = keys.stage;
          make_dq(rDQ, ds, key_stage);
          ds_ring.advance();
          keys.advance();
          begin_tile(t + 1);
          ptx::wgmma_wait<1>();
          ptx::wgmma_pin(rDK);
          release_read(smem.q_empty[stage]);
          release(smem.k_empty[key_stage]);
          write_dq();
          send_dq();
          break;
        }
        wait_for_queries(s, smem.q[ring.stage], smem.q_full[ring.stage]);
        multiply_keys_queries(rS, keys.stage, ring.stage);
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(rDK);
        release_read(smem.q_empty[stage]);

        // dQ, once the other warpgroup has its dS, while the next S becomes P; the next dP while dQ
        // leaves.
        ptx::mbarrier_wait(smem.ds_full[ds_ring.stage], ds_ring.phase);
        make_dq(rDQ, ds, keys.stage);
        ds_ring.advance();
        draw(smem.steps[ring.stage].head, smem.steps[ring.stage].row);
        ptx::wgmma_wait<1>();
        make_probabilities();
        ptx::wgmma_wait<0>();
        write_dq();
        dq_is_written = true;
        wait_for_queries(s, smem.dout[ring.stage], smem.dout_full[ring.stage]);
        multiply_values_gradients(rDP, ring.stage);
      }
      sync_consumers();  // Both have read dS: its place is free.
    }

    // dV and dK leave through the place of dS.
    GradientTile& gradient = reinterpret_cast<GradientTile*>(smem.ds)[consumer];
    const int own_barrier = static_cast<int>(ConsumerBarrier::kOwn) + consumer;
    const int rows = s.key_rows - s.first_row - 64 * consumer;
    const auto store = [&](const float (&rD)[kHeadDim / 8][4], float scale, const Tensor& tensor,
                           int64_t cols) {
      Element* destination = element_pointer<Element>(
          tensor, place.batch, s.key_start + s.first_row + 64 * consumer, place.kv_head);
      store_gradient<Element>(gradient, rD, scale, destination, tensor.row_stride, rows,
                              static_cast<int>(cols), own_barrier);
    };
    if (place.dkv_sum == nullptr) {
      const float dropout = dropout_scale(a.p.dropout);
      store(rDV, dropout, a.p.dv, a.p.value_dim);
      store(rDK, a.p.scale * dropout, a.p.dk, a.p.head_dim);
    } else {
      float* const sum = place.dkv_sum + consumer * (64 * kHeadDim);
      store_sum(sum, rDK);
      store_sum(sum + a.plan.dkv_elements, rDV);
    }
    sync_consumers();  // Everyone has left the tile and the place of dS.
    release_read(smem.place_empty[t % 2]);
  }
  ptx::wgmma_wait<0>();
  ptx::mbarrier_wait(smem.dq_empty[consumer], dq_phase ^ 1);
  if (thread == 0) smem.is_end[device::thread_index() / 128 - 1] = true;
  __syncwarp();  // The end is written before it is told.
  release(smem.dq_full[consumer]);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(shared);
  // NOTE: the shuffle tells the compiler that a warp is of one mind.
  const int warpgroup = __shfl_sync(device::kWarp, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) initialise_barriers<Traits>(smem);
  fill_weights<typename Traits::Element>(smem.weights);
  ptx::fence_async_shared();
  __syncthreads();  // The barriers exist, the constants are written.
  if (warpgroup == 0) {
    ptx::give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<Traits>(a, smem);
    } else if (threadIdx.x == 32 || threadIdx.x == 64) {
      add_blocks<Traits>(a, smem, static_cast<int>(threadIdx.x) / 32 - 1);
    }
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    consume<Traits>(a, smem, warpgroup - 1);
  }
}

}  // namespace jax_flash::attention::sm90
