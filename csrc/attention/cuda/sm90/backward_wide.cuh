// The Hopper backward of head dims up to 256, by pairs of CTAs (clusters of two) that share 128
// keys by the nature of the work. One warpgroup has no registers for dK and dV of 64 keys:
//   values CTA (rank 0)   S^T = K Q^T,     P,                         dV += P^T dO
//   keys CTA (rank 1)     dP^T = V dO^T,   dS = P * (dP - delta),     dK += dS^T Q
// Of each, two consumer warpgroups have 64 keys each. P goes from the first to the second and dS
// back through distributed shared memory, so that a third warpgroup of each CTA makes a half of the
// dims of dQ, of all 128 keys: half as much to add to the sums in L2 as with 64 keys, which is what
// limits this head dim. A warp of a fourth brings the operands. docs/kernels/hopper_backward.md.
#pragma once

#include "attention/cuda/sm90/backward_consumer.cuh"
#include "attention/cuda/sm90/backward_dropout.cuh"
#include "attention/cuda/sm90/backward_mask.cuh"
#include "attention/cuda/sm90/backward_wide_supply.cuh"
#include "device/opaque.cuh"
#include "device/shared_tile.cuh"
#include "ptx/cluster.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

template <typename Element_, int kHeadDim_, bool kHasDropout_>
struct WideTraits {
  using Element = Element_;
  static constexpr bool kHasDropout = kHasDropout_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = 64, kBlockN = 128;  // queries of a step, keys of the pair
  static constexpr int kTermRows = 0;                // lse and delta come as they are
  static constexpr bool kAddsInOrder = false;        // to dQ, where deterministic
  static constexpr bool kStoresFirst = false;
  static constexpr int kClusterSize = 2, kThreads = 512;
  // 4 x 128 registers a thread of each warpgroup's rank at launch.
  static constexpr int kProducerRegisters = 32, kDqRegisters = 64, kConsumerRegisters = 208;

  using KeyTile = device::SharedTile<kBlockN, kHeadDim>;
  using HalfKeyTile = device::SharedTile<kBlockN, kHeadDim / 2>;
  using QueryTile = device::SharedTile<kBlockM, kHeadDim>;
  using ScoreTile = device::SharedTile<kBlockN, kBlockM>;  // dS^T
  using Probabilities = uint4[kBlockM / 16][128];          // P^T as operand A: [16 queries][thread]

  // Tiles in a row: Q, dO of each step (values CTA), dO, Q of each (keys CTA).
  template <bool kIsValues>
  static constexpr int kSlots = kIsValues ? 4 : 3;

  struct Step {
    int head, row;
    bool is_full, is_last;
  };
  struct Smem {
    KeyTile keys;  // K, or V; in the end: dV, or dK, on its way out
    union {
      QueryTile tiles[4];
      struct {
        QueryTile first_tiles[3];
        HalfKeyTile half_keys;  // keys CTA: K, the second half of the dims
      };
    };
    union {
      ScoreTile ds[2];  // values CTA: of two steps
      struct {
        ScoreTile own_ds;                // keys CTA
        Probabilities probabilities[2];  // keys CTA, a consumer each
      };
    };
    float stats[4][kBlockM];  // a slot each: lse beside Q, or delta beside dO; see stats_index
    // Keys CTA, with dropout: -delta in 16 bits as well, in the same order.
    alignas(16) uint32_t minus_delta[4][kHasDropout ? kBlockM / 2 : 1];
    Step steps[4];  // a slot each, of a step's first
    KeyTilePlace places[2];
    // Those of both CTAs.
    ptx::Mbarrier place_full[2], place_empty[2];  // the latter the values CTA's, for both
    ptx::Mbarrier keys_full, keys_empty, dq_done, ragged;
    ptx::Mbarrier full[4], empty[4];  // of the slots
    // The values CTA's.
    ptx::Mbarrier p_empty[2], ds_full[2];  // a consumer each; a step each
    // The keys CTA's.
    ptx::Mbarrier half_full, p_full[2], own_ds_full, own_ds_empty, ds_empty[2];
  };
  static_assert(sizeof(QueryTile) == sizeof(HalfKeyTile));
  static_assert(sizeof(ScoreTile) == sizeof(Probabilities[2]));
  static_assert(sizeof(Smem) <= 227 * 1024);
};

template <class Traits>
__device__ __forceinline__ void initialise_wide_barriers(typename Traits::Smem& smem) {
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(smem.place_full[i], 1);
    // Of each CTA the consumers' and dQ's warps and the thread that looks after dS's way; and the
    // keys CTA's producer.
    ptx::mbarrier_init(smem.place_empty[i], 2 * (12 * kWarpLanes + 1) + kWarpLanes);
    ptx::mbarrier_init(smem.p_empty[i], 4);
    ptx::mbarrier_init(smem.ds_full[i], 1);
    ptx::mbarrier_init(smem.p_full[i], 1);
    ptx::mbarrier_init(smem.ds_empty[i], 4);
  }
  for (int i = 0; i < 4; ++i) {
    ptx::mbarrier_init(smem.full[i], 1);
    ptx::mbarrier_init(smem.empty[i], 8 * kWarpLanes);
  }
  ptx::mbarrier_init(smem.keys_full, 1);
  ptx::mbarrier_init(smem.keys_empty, 8);
  ptx::mbarrier_init(smem.dq_done, 4);
  ptx::mbarrier_init(smem.half_full, 1);
  ptx::mbarrier_init(smem.own_ds_full, 8);
  ptx::mbarrier_init(smem.own_ds_empty, 4 + 1);
  ptx::mbarrier_init(smem.ragged, 1);
  // What the other CTA sends counts from the start.
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_arrive_expect(smem.p_full[i], sizeof(typename Traits::Probabilities));
    ptx::mbarrier_arrive_expect(smem.ds_full[i], sizeof(typename Traits::ScoreTile));
  }
  ptx::fence_barrier_init();
}

// A consumer warpgroup: 64 keys, dV (of the values CTA) or dK (of the keys CTA).
template <class Traits, bool kIsValues>
class WideConsumer {
  using Element = typename Traits::Element;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using ScoreTile = typename Traits::ScoreTile;
  using Smem = typename Traits::Smem;
  static constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;
  static constexpr int kGroups = kBlockM / 16;  // of 16 queries
  using Scores = float[kBlockM / 8][4];
  using Gradient = float[kHeadDim / 8][4];
  using Operand = uint32_t[kGroups][4];

 public:
  __device__ __forceinline__ WideConsumer(const BackwardArguments& a, Smem& smem, int consumer)
      : a_(a), smem_(smem), consumer_(consumer) {}

  __device__ __forceinline__ void run() {
    for (int t = 0;; ++t) {
      ptx::mbarrier_wait(smem_.place_full[t % 2], t / 2 & 1);
      const KeyTilePlace& place = smem_.places[t % 2];
      if (!place.exists) break;
      Gradient rD = {};
      if (place.num_steps > 0) {
        if constexpr (kIsValues) {
          pass_values(place, rD);
          // NOTE: dQ reads the keys of both consumers.
          ptx::mbarrier_wait(smem_.dq_done, key_phase_);
        } else {
          pass_keys(rD);
        }
        key_phase_ ^= 1;
      }
      store(place, rD);
      if (place.num_steps > 0) {
        ptx::fence_async_shared();
        __syncwarp();  // All lanes have copied before the keys are loaded again.
      }
      if (place.num_steps > 0) release(smem_.keys_empty);
      ptx::mbarrier_arrive_at(smem_.place_empty[t % 2], 0);
    }
  }

 private:
  __device__ __forceinline__ static int thread() { return threadIdx.x % 128; }
  __device__ __forceinline__ int warp_row() const { return 64 * consumer_ + thread() / 32 * 16; }

  // S^T or dP^T of the slot at hand, plus its stats times `factor`.
  __device__ __forceinline__ void multiply(Scores& rD, float factor, int quad_lane) {
    begin_scores(rD, smem_.stats[ring_.stage], factor, quad_lane);
    const ptx::MatrixDescriptor a =
        ptx::MatrixDescriptor(&smem_.keys, 0) + device::opaque(consumer_) * (4 * ptx::kRows16);
    const ptx::MatrixDescriptor b = ptx::MatrixDescriptor(&smem_.tiles[ring_.stage], 0);
    ptx::wgmma_pin(rD);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      ptx::wgmma<Element, false, false>(
          rD, a + (k / 4 * (KeyTile::kSlabBytes >> 4) + k % 4 * ptx::kColumns16),
          b + (k / 4 * (QueryTile::kSlabBytes >> 4) + k % 4 * ptx::kColumns16), true);
    }
    ptx::wgmma_commit();
  }
  // dV += P^T dO or dK += dS^T Q.
  __device__ __forceinline__ static void accumulate(Gradient& rD, Operand& rA,
                                                    const QueryTile& queries) {
    // Two halves: ptxas refuses an instruction with 128 accumulators in a kernel of 512 threads.
    constexpr int kHalf = kHeadDim / 16;
    auto& left = reinterpret_cast<float (&)[kHalf][4]>(rD[0]);
    auto& right = reinterpret_cast<float (&)[kHalf][4]>(rD[kHalf]);
    const ptx::MatrixDescriptor b = ptx::MatrixDescriptor(&queries, QueryTile::kSlabBytes);
    ptx::wgmma_pin(rD);
    ptx::wgmma_pin(rA);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      ptx::wgmma<Element, true>(left, rA[k], b + k * ptx::kRows16, true);
      ptx::wgmma<Element, true>(
          right, rA[k], b + (kHeadDim / 128 * (QueryTile::kSlabBytes >> 4) + k * ptx::kRows16),
          true);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void pass_values(const KeyTilePlace& place, Gradient& rDV) {
    const float scale_log2 = a_.p.scale * 1.4426950408889634f;
    const Sequence& s = place.sequence;
    const int quad_lane = device::thread_index() % 4;
    Scores rS;
    Operand rP;
    DroppedBits dropped[1];  // with dropout, of the step at hand
    const auto draw = [&] {
      if constexpr (Traits::kHasDropout) {
        const typename Traits::Step& step = smem_.steps[ring_.stage];
        Ring<Traits::template kSlots<true>> dout = ring_;
        dout.advance();
        ptx::mbarrier_wait(smem_.full[dout.stage], dout.phase);
        const DropoutWords words = place.dropout;
        dropped[0] = draw_dropped<4>(words, a_.p.dropout.head_ids[step.head],
                                     a_.p.dropout.threshold, step.row, s.first_row + warp_row());
      }
    };
    ptx::mbarrier_wait(smem_.keys_full, key_phase_);
    ptx::mbarrier_wait(smem_.full[ring_.stage], ring_.phase);
    ptx::wgmma_pin(rDV);
    multiply(rS, a_.lse_factor, quad_lane);
    bool is_first = true;
    while (true) {
      draw();
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(rDV);
      const int q_slot = ring_.stage;
      if (!is_first) release_read(smem_.empty[q_slot ^ 2 | 1]);  // of the step before
      is_first = false;
      const typename Traits::Step& step = smem_.steps[q_slot];
      const bool is_full = step.is_full, is_last = step.is_last;
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(rS);
      if (!is_full) {
        mask_scores(rS, s, BlockMask(a_.p.mask, place.batch, step.head), s.first_row + warp_row(),
                    step.row);
      }
      exponentiate<Element, Traits::kHasDropout>(rS, rP, scale_log2);
      const uint32_t p_target = ptx::peer_address(&smem_.probabilities[consumer_][0][thread()], 1);
      const uint32_t p_full = ptx::peer_address(&smem_.p_full[consumer_], 1);
      // Two slots a step: the stage tells odd steps from even ones.
      ptx::mbarrier_wait(smem_.p_empty[consumer_], q_slot / 2 ^ 1);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if constexpr (Traits::kHasDropout) {
          uint32_t rKept[4];
          drop<Element>(rP[j], dropped, j, rKept);
          ptx::store_async(p_target + j * 2048, rP[j], p_full);
#pragma unroll
          for (int word = 0; word < 4; ++word) rP[j][word] = rKept[word];
        } else {
          ptx::store_async(p_target + j * 2048, rP[j], p_full);
        }
      }
      release_read(smem_.empty[q_slot]);
      ring_.advance();

      const int dout_slot = ring_.stage;
      if constexpr (!Traits::kHasDropout) {
        ptx::mbarrier_wait(smem_.full[dout_slot], ring_.phase);
      }
      accumulate(rDV, rP, smem_.tiles[dout_slot]);
      ring_.advance();
      if (is_last) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(rDV);
        release_read(smem_.empty[dout_slot]);
        break;
      }
      ptx::mbarrier_wait(smem_.full[ring_.stage], ring_.phase);
      multiply(rS, a_.lse_factor, quad_lane);
    }
  }

  __device__ __forceinline__ void pass_keys(Gradient& rDK) {
    const int quad_lane = device::thread_index() % 4;
    Scores rDP;
    Operand rP, rDS;
    ptx::mbarrier_wait(smem_.keys_full, key_phase_);
    ptx::mbarrier_wait(smem_.full[ring_.stage], ring_.phase);
    ptx::wgmma_pin(rDK);
    multiply(rDP, -1.0f, quad_lane);
    const device::LdmatrixAddress<ScoreTile> ds_address(
        smem_.own_ds, device::LdmatrixAddress<ScoreTile>::Order::kRowsFirst, warp_row());
    while (true) {
      const int dout_slot = ring_.stage;
      const bool is_last = smem_.steps[dout_slot].is_last;
      take_probabilities(rP);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(rDP);
      if constexpr (!Traits::kHasDropout) release_read(smem_.empty[dout_slot]);
      ptx::mbarrier_wait(smem_.own_ds_empty, step_phase_ ^ 1);
      step_phase_ ^= 1;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if constexpr (Traits::kHasDropout) {
          uint32_t rKept[4];
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            rKept[word] = kept_part<Element>(rP[j][word] & 0x7fff7fffu, rP[j][word]);
          }
          differentiate<Element>(rDP, rP[j], rKept,
                                 load_minus_delta(smem_.minus_delta[dout_slot], j), j, rDS[j]);
        } else {
          differentiate<Element>(rDP, rP[j], j, rDS[j]);
        }
        ptx::stmatrix_x4(ds_address(0, 16 * j), rDS[j]);
      }
      // With dropout -delta has been read only now.
      if constexpr (Traits::kHasDropout) release_read(smem_.empty[dout_slot]);
      ptx::fence_async_shared();
      __syncwarp();  // All lanes' elements are written and fenced.
      release(smem_.own_ds_full);
      ring_.advance();
      const int q_slot = ring_.stage;
      ptx::mbarrier_wait(smem_.full[q_slot], ring_.phase);
      accumulate(rDK, rDS, smem_.tiles[q_slot]);
      ring_.advance();
      if (is_last) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(rDK);
        release_read(smem_.empty[q_slot]);
        break;
      }
      ptx::mbarrier_wait(smem_.full[ring_.stage], ring_.phase);
      multiply(rDP, -1.0f, quad_lane);
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(rDK);
      release_read(smem_.empty[q_slot]);
    }
  }
  // P of a step, from the values CTA, whose next may then come.
  __device__ __forceinline__ void take_probabilities(Operand& rP) {
    ptx::mbarrier_wait(smem_.p_full[consumer_], step_phase_);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const uint4 p = smem_.probabilities[consumer_][j][thread()];
      rP[j][0] = p.x;
      rP[j][1] = p.y;
      rP[j][2] = p.z;
      rP[j][3] = p.w;
    }
    if (thread() == 0) {
      ptx::mbarrier_arrive_expect(smem_.p_full[consumer_], sizeof(typename Traits::Probabilities));
    }
    // The last load of the warp, and so all, have ended: the values CTA may write there again.
    if (thread() % 32 == 0) {
      ptx::mbarrier_arrive_at_after(smem_.p_empty[consumer_], 0, rP[kGroups - 1][3]);
    }
  }

  // Writes dV or dK, through the place of this consumer's keys.
  __device__ __forceinline__ void store(const KeyTilePlace& place, const Gradient& rD) {
    constexpr int kChunks = kHeadDim / 8;
    // NOTE: read here, or what follows from it is computed ahead of the steps, and spilled.
    const int index = device::thread_index(), thread = index % 128, consumer = index / 128 - 2;
    if (place.dkv_sum != nullptr) {
      store_sum(place.dkv_sum + (kIsValues ? a_.plan.dkv_elements : 0) + consumer * 64 * kHeadDim,
                rD);
      return;
    }
    const Sequence& s = place.sequence;
    const Tensor& tensor = kIsValues ? a_.p.dv : a_.p.dk;
    const int cols = static_cast<int>(kIsValues ? a_.p.value_dim : a_.p.head_dim);
    const int first = s.first_row + 64 * consumer;
    const int rows = s.key_rows - first, col = thread % kChunks * 8;
    const bool has_steps = place.num_steps > 0;
    if (has_steps) {
      const float scale = dropout_scale(a_.p.dropout) * (kIsValues ? 1.0f : a_.p.scale);
      using Address = device::LdmatrixAddress<KeyTile>;
      stage_gradient<Element, KeyTile>(Address(smem_.keys, Address::Order::kRowsFirst,
                                               64 * consumer + thread / 32 * 16, thread % 32),
                                       rD, scale);
      // The tile is written before others copy it.
      ptx::named_barrier_sync(1 + consumer, 128);
    }
    Element* destination =
        element_pointer<Element>(tensor, place.batch, s.key_start + first, place.kv_head);
#pragma unroll 4
    for (int row = thread / kChunks; row < 64; row += 128 / kChunks) {
      if (row < rows && col < cols) {
        // Without steps the place of the keys may belong to the next tile already.
        uint4 chunk = {};
        if (has_steps) {
          chunk = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(smem_.keys.data) +
                                                  KeyTile::offset(64 * consumer + row, col));
        }
        *reinterpret_cast<uint4*>(destination + row * tensor.row_stride + col) = chunk;
      }
    }
  }

  const BackwardArguments& a_;
  Smem& smem_;
  const int consumer_;
  Ring<Traits::template kSlots<kIsValues>> ring_;
  uint32_t key_phase_ = 0;
  uint32_t step_phase_ = 0;  // of the keys CTA, where P and dS have one place
};

// One CTA of a pair.
template <class Traits, bool kIsValues>
__device__ __forceinline__ void run_wide(const BackwardArguments& a, typename Traits::Smem& smem,
                                         int warpgroup) {
  if (warpgroup == 0) {
    ptx::give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) {
      bring_operands<Traits, kIsValues>(a, smem);
    } else if (threadIdx.x == 32) {
      if constexpr (kIsValues) {
        confirm_scores<Traits>(smem);
      } else {
        pass_scores<Traits>(smem);
      }
    }
    __syncwarp();  // The lane that looked after dS is back.
  } else if (warpgroup == 1) {
    ptx::give_registers<Traits::kDqRegisters>();
    make_dq<Traits, kIsValues>(a, smem);
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    WideConsumer<Traits, kIsValues>(a, smem, warpgroup - 2).run();
  }
}

template <class Traits>
__global__ void __cluster_dims__(Traits::kClusterSize, 1, 1) __launch_bounds__(Traits::kThreads, 1)
    wide_kernel(const __grid_constant__ BackwardArguments a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(shared);
  // NOTE: the shuffle tells the compiler that a warp is of one mind.
  const int warpgroup = __shfl_sync(device::kWarp, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) initialise_wide_barriers<Traits>(smem);
  ptx::cluster_sync();  // The barriers exist, in both CTAs.
  if (ptx::cluster_rank() == 0) {
    run_wide<Traits, true>(a, smem, warpgroup);
  } else {
    run_wide<Traits, false>(a, smem, warpgroup);
  }
  ptx::cluster_sync();  // The other CTA reaches into our shared memory until it is done.
}

}  // namespace jax_flash::attention::sm90
