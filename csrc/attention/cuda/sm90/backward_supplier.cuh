// The Hopper backward as in backward.cuh, but the first warpgroup, which brings the operands, makes
// dQ as well: the consumers, rid of dQ's accumulators and of its way out, never wait for each
// other. Faster at head dims up to 64, where a step has 128 queries.
// docs/kernels/hopper_backward.md.
#pragma once

#include "attention/cuda/sm90/backward_consumer.cuh"
#include "attention/cuda/sm90/backward_dropout.cuh"
#include "attention/cuda/sm90/backward_mask.cuh"
#include "attention/cuda/sm90/backward_supplied.cuh"
#include "attention/cuda/sm90/backward_supply.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

template <typename Element_, int kHeadDim_, int kBlockM_, int kStages_, bool kHasDropout_>
struct SupplierTraits {
  using Element = Element_;
  static constexpr bool kHasDropout = kHasDropout_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;  // queries of a step
  static constexpr int kBlockN = 128;       // keys of the CTA, 64 a warpgroup
  static constexpr int kStages = kStages_;  // Q and dO tiles in shared memory
  static constexpr int kConsumers = 2, kConsumerThreads = 128 * kConsumers;
  static constexpr int kTermRows = kTermParts;  // of S
  static constexpr bool kAddsInOrder = false;   // to dQ, where deterministic
  static constexpr bool kStoresFirst = false;
  static constexpr int kClusterSize = 1, kThreads = 128 + kConsumerThreads;
  // 3 x 168 registers a thread of each warpgroup's rank at launch.
  static constexpr int kSupplierRegisters = 72, kConsumerRegisters = 216;
  static constexpr int kDqBlocks = kBlockM / 64 * (kHeadDim / 64);  // of 64 queries x 64 dims

  using KeyTile = device::SharedTile<kBlockN, kHeadDim>;
  using QueryTile = device::SharedTile<kBlockM, kHeadDim>;
  using ScoreTile = device::SharedTile<kBlockN, kBlockM>;  // dS^T
  using GradientTile = device::SharedTile<64, kHeadDim>;   // a warpgroup's dK or dV

  // What consumers must know of a step.
  struct Step {
    int head, row;
    bool is_full, is_last;
  };
  struct Smem {
    KeyTile k, v;
    QueryTile q[kStages], dout[kStages];
    TermTile<kBlockM> terms[kStages];
    ScoreTile ds[2];       // in the end: dK and dV on their way out
    float dq[2][64 * 64];  // blocks of dQ on their way out, [n][thread][4]
    Weights weights;
    float delta[kStages][kBlockM];  // in the order of stats_index
    Step steps[kStages];
    KeyTilePlace places[2];
    ptx::Mbarrier place_full[2], place_empty[2], k_full, k_empty, v_full;
    ptx::Mbarrier q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    ptx::Mbarrier ds_full[2], ds_empty[2], ragged;
  };
  static_assert(sizeof(GradientTile) * kConsumers <= sizeof(ScoreTile) * 2);
  static_assert(sizeof(Smem) <= 227 * 1024);
};

template <class Traits>
__device__ __forceinline__ void initialise_supplier_barriers(typename Traits::Smem& smem) {
  constexpr uint32_t kWarps = 4 * Traits::kConsumers;
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(smem.place_full[i], 1);
    ptx::mbarrier_init(smem.place_empty[i], 1);
    ptx::mbarrier_init(smem.ds_full[i], kWarps);
    ptx::mbarrier_init(smem.ds_empty[i], 4);
  }
  ptx::mbarrier_init(smem.k_full, 1);
  ptx::mbarrier_init(smem.k_empty, kWarps);
  ptx::mbarrier_init(smem.v_full, 1);
  for (int i = 0; i < Traits::kStages; ++i) {
    ptx::mbarrier_init(smem.q_full[i], 1);
    ptx::mbarrier_init(smem.q_empty[i], kWarps);
    ptx::mbarrier_init(smem.dout_full[i], 1);
    ptx::mbarrier_init(smem.dout_empty[i], kWarps);
  }
  ptx::mbarrier_init(smem.ragged, 1);
  ptx::fence_barrier_init();
}

template <class Traits>
__device__ __forceinline__ void consume_supplied(const BackwardArguments& a,
                                                 typename Traits::Smem& smem, int consumer) {
  using Element = typename Traits::Element;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using ScoreTile = typename Traits::ScoreTile;
  using GradientTile = typename Traits::GradientTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kHeadDim = Traits::kHeadDim;
  const int thread = threadIdx.x % 128;
  const int warp_row = 64 * consumer + thread / 32 * 16;  // of the key tile
  const float scale_log2 = a.p.scale * 1.4426950408889634f;

  const auto sync_consumers = [] {
    ptx::named_barrier_sync(static_cast<int>(SupplierBarrier::kConsumers),
                            Traits::kConsumerThreads);
  };

  // S^T and dP^T of this warpgroup's 64 keys. NOTE: with terms in dP as well ptxas finds no
  // registers (C7512).
  const auto own_keys = [&](const KeyTile& keys) {
    return ptx::MatrixDescriptor(&keys, 0) + consumer * (4 * ptx::kRows16);
  };
  const auto multiply_keys_queries = [&](float (&rS)[kBlockM / 8][4], int stage) {
    add_terms<Element, 0>(rS, smem.terms[stage], smem.weights);
    multiply_keys<Element, KeyTile, true>(rS, own_keys(smem.k), smem.q[stage]);
    ptx::wgmma_commit();
  };
  const auto multiply_values_gradients = [&](float (&rDP)[kBlockM / 8][4], int stage) {
    multiply_keys<Element, KeyTile, false>(rDP, own_keys(smem.v), smem.dout[stage]);
    ptx::wgmma_commit();
  };

  Ring<Traits::kStages> ring;
  Ring<2> ds_ring;
  uint32_t key_phase = 0;
  for (int t = 0;; ++t) {
    ptx::mbarrier_wait(smem.place_full[t % 2], t / 2 & 1);
    const KeyTilePlace& place = smem.places[t % 2];
    if (!place.exists) break;
    const Sequence& s = place.sequence;

    float rDK[kHeadDim / 8][4] = {}, rDV[kHeadDim / 8][4] = {};
    if (place.num_steps > 0) {
      float rS[kBlockM / 8][4], rDP[kBlockM / 8][4];
      uint32_t rP[kBlockM / 16][4], rDS[kBlockM / 16][4];
      DroppedBits dropped[kBlockM / 64];  // with dropout, of the step at hand
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
      const auto draw = [&] {
        if constexpr (Traits::kHasDropout) {
          // NOTE: sooner than it must be: ptxas mixes the draws with the instructions of S, and so
          // delays those, unless a branch is between them.
          ptx::mbarrier_wait(smem.dout_full[ring.stage], ring.phase);
          const typename Traits::Step& step = smem.steps[ring.stage];
          const DropoutWords words = place.dropout;
          const uint32_t head_id = a.p.dropout.head_ids[step.head];
#pragma unroll
          for (int i = 0; i < kBlockM / 64; ++i) {
            dropped[i] = draw_dropped<4>(words, head_id, a.p.dropout.threshold, step.row + 64 * i,
                                         s.first_row + warp_row);
          }
        }
      };
      ptx::mbarrier_wait(smem.k_full, key_phase);
      ptx::mbarrier_wait(smem.q_full[ring.stage], ring.phase);
      ptx::wgmma_pin(rDK);
      ptx::wgmma_pin(rDV);
      multiply_keys_queries(rS, ring.stage);
      draw();
      ptx::mbarrier_wait(smem.v_full, key_phase);

      while (true) {
        // In flight: S.
        const int stage = ring.stage;
        ptx::wgmma_wait<0>();
        make_probabilities();
        if constexpr (!Traits::kHasDropout) {
          ptx::mbarrier_wait(smem.dout_full[stage], ring.phase);
        }
        multiply_values_gradients(rDP, stage);
        uint32_t rKept[kBlockM / 16][4];
        accumulate_kept<Element, Traits::kHasDropout>(rDV, rP, dropped, rKept, smem.dout[stage]);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(rDP);
        // dP -> dS, while dV runs.
        ptx::mbarrier_wait(smem.ds_empty[ds_ring.stage], ds_ring.phase ^ 1);
        ScoreTile& ds = smem.ds[ds_ring.stage];
        const device::LdmatrixAddress<ScoreTile> ds_address(
            ds, device::LdmatrixAddress<ScoreTile>::Order::kRowsFirst, warp_row);
#pragma unroll
        for (int j = 0; j < kBlockM / 16; ++j) {
          if constexpr (Traits::kHasDropout) {
            differentiate<Element>(rDP, rP[j], rKept[j], smem.delta[stage], j, rDS[j]);
          } else {
            differentiate<Element>(rDP, rP[j], smem.delta[stage], j, rDS[j]);
          }
          ptx::stmatrix_x4(ds_address(0, 16 * j), rDS[j]);
        }
        const bool is_last = smem.steps[stage].is_last;
        // dK, issued before the fence that waits for the stores, and the next step's S behind it.
        accumulate<Element>(rDK, rDS, smem.q[stage]);
        ptx::wgmma_commit();
        ptx::fence_async_shared();
        __syncwarp();  // All lanes' elements are written and fenced.
        release(smem.ds_full[ds_ring.stage]);
        ds_ring.advance();
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(rDV);
        release(smem.dout_empty[stage]);
        ring.advance();
        if (is_last) {
          release(smem.k_empty);
          ptx::wgmma_wait<0>();
          ptx::wgmma_pin(rDK);
          release(smem.q_empty[stage]);
          break;
        }
        ptx::mbarrier_wait(smem.q_full[ring.stage], ring.phase);
        multiply_keys_queries(rS, ring.stage);
        draw();
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(rDK);
        release(smem.q_empty[stage]);
      }
      key_phase ^= 1;
      // dQ is made: the place of dS is free.
      Ring<2> last = ds_ring;
      for (int i = 0; i < 2; ++i, last.advance()) {
        ptx::mbarrier_wait(smem.ds_empty[last.stage], last.phase ^ 1);
      }
    }

    // dV and dK leave through the place of dS.
    GradientTile& gradient = reinterpret_cast<GradientTile*>(smem.ds)[consumer];
    const int own_barrier = static_cast<int>(SupplierBarrier::kOwn) + consumer;
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
    if (consumer == 0 && thread == 0) ptx::mbarrier_arrive(smem.place_empty[t % 2]);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    supplier_kernel(const __grid_constant__ BackwardArguments a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(shared);
  run_supplied<Traits>(
      smem, [&] { initialise_supplier_barriers<Traits>(smem); }, [&] { supply<Traits>(a, smem); },
      [&](int consumer) { consume_supplied<Traits>(a, smem, consumer); });
}

}  // namespace jax_flash::attention::sm90
