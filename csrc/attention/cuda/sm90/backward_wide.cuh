// The Hopper backward of head dims up to 256: one warpgroup has no registers for dK and dV of 64
// keys, so that the two consumers share the work by its nature:
//   consumer 0   S^T = K Q^T,  P,   dV += P^T dO
//   consumer 1   dP^T = V dO^T,  dS = P * (dP - delta),   dK += dS^T Q
// P goes from one to the other through shared memory. A third warpgroup makes dQ and adds it to the
// sums, a warp of a fourth brings the operands. docs/kernels/hopper_backward.md.
#pragma once

#include "attention/cuda/dropout.cuh"
#include "attention/cuda/sm90/backward_consumer.cuh"
#include "attention/cuda/sm90/backward_mask.cuh"
#include "attention/cuda/sm90/backward_wide_supply.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

template <typename Element_, int kHeadDim_>
struct WideTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = 64, kBlockN = 64;  // queries of a step, keys of the CTA
  static constexpr int kStages = 2;                 // Q and dO tiles in shared memory
  static constexpr int kTermRows = 0;               // no room for them
  static constexpr bool kAddsInOrder = false;       // to dQ, where deterministic
  static constexpr int kThreads = 512;
  // 4 x 128 registers a thread of each warpgroup's rank at launch.
  static constexpr int kProducerRegisters = 32, kDqRegisters = 64, kConsumerRegisters = 208;

  using KeyTile = device::SharedTile<kBlockN, kHeadDim>;
  using QueryTile = device::SharedTile<kBlockM, kHeadDim>;
  using ScoreTile = device::SharedTile<kBlockN, kBlockM>;  // dS^T

  struct Step {
    int head, row;
    bool is_full, is_last;
  };
  struct Smem {
    KeyTile k, v;  // in the end: dK and dV on their way out
    QueryTile q[kStages], dout[kStages];
    ScoreTile ds[2];
    uint4 p[2][kBlockM / 16][128];                         // P^T as operand A: [16 queries][thread]
    float lse[kStages][kBlockM], delta[kStages][kBlockM];  // in the order of stats_index
    Step steps[kStages];
    KeyTilePlace places[2];
    ptx::Mbarrier place_full[2], place_empty[2], k_full, k_empty, v_full;
    ptx::Mbarrier q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    ptx::Mbarrier p_full[2], p_empty[2], ds_full[2], ds_empty[2], ragged;
  };
  static_assert(sizeof(Smem) <= 227 * 1024);
};

template <class Traits>
__device__ __forceinline__ void initialise_wide_barriers(typename Traits::Smem& smem) {
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(smem.place_full[i], 1);
    ptx::mbarrier_init(smem.place_empty[i], 12);
    ptx::mbarrier_init(smem.p_full[i], 4);
    ptx::mbarrier_init(smem.p_empty[i], 4);
    ptx::mbarrier_init(smem.ds_full[i], 4);
    ptx::mbarrier_init(smem.ds_empty[i], 4);
    ptx::mbarrier_init(smem.q_full[i], 1);
    ptx::mbarrier_init(smem.q_empty[i], 8);
    ptx::mbarrier_init(smem.dout_full[i], 1);
    ptx::mbarrier_init(smem.dout_empty[i], 8);
  }
  ptx::mbarrier_init(smem.k_full, 1);
  ptx::mbarrier_init(smem.k_empty, 8);
  ptx::mbarrier_init(smem.v_full, 1);
  ptx::mbarrier_init(smem.ragged, 1);
  ptx::fence_barrier_init();
}

template <class Traits>
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
  __device__ __forceinline__ WideConsumer(const BackwardArguments& a, Smem& smem)
      : a_(a), smem_(smem) {}

  template <bool kIsValue>
  __device__ __forceinline__ void run() {
    for (int t = 0;; ++t) {
      ptx::mbarrier_wait(smem_.place_full[t % 2], t / 2 & 1);
      const KeyTilePlace& place = smem_.places[t % 2];
      if (!place.exists) break;
      Gradient rD = {};
      if (place.num_steps > 0) {
        if constexpr (kIsValue) {
          pass_values(place, rD);
        } else {
          pass_keys(place, rD);
        }
        key_phase_ ^= 1;
      }
      store<kIsValue>(place, rD);
      if (place.num_steps > 0) {
        ptx::fence_async_shared();
        __syncwarp();  // All lanes have copied before K and V are loaded again.
        release(smem_.k_empty);
      }
      __syncwarp();  // All lanes have left the place.
      release(smem_.place_empty[t % 2]);
    }
  }

 private:
  __device__ __forceinline__ static int thread() { return threadIdx.x % 128; }

  // S^T or dP^T.
  __device__ __forceinline__ static void multiply(Scores& rD, const KeyTile& keys,
                                                  const QueryTile& queries) {
    const ptx::MatrixDescriptor a = ptx::MatrixDescriptor(&keys, 0);
    const ptx::MatrixDescriptor b = ptx::MatrixDescriptor(&queries, 0);
    ptx::wgmma_pin(rD);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      ptx::wgmma<Element, false, false>(
          rD, a + (k / 4 * (KeyTile::kSlabBytes >> 4) + k % 4 * ptx::kColumns16),
          b + (k / 4 * (QueryTile::kSlabBytes >> 4) + k % 4 * ptx::kColumns16), k > 0);
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
    const int warp_row = thread() / 32 * 16;
    const Sequence& s = place.sequence;
    Scores rS;
    Operand rP;
    ptx::mbarrier_wait(smem_.k_full, key_phase_);
    ptx::mbarrier_wait(smem_.q_full[ring_.stage], ring_.phase);
    ptx::wgmma_pin(rDV);
    multiply(rS, smem_.k, smem_.q[ring_.stage]);
    while (true) {
      const int stage = ring_.stage;
      const typename Traits::Step& step = smem_.steps[stage];
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(rS);
      if (!step.is_full) {
        mask_scores(rS, s, BlockMask(a_.p.mask, place.batch, step.head), s.first_row + warp_row,
                    step.row);
      }
      exponentiate<Element>(rS, rP, smem_.lse[stage], scale_log2);
      const bool is_last = step.is_last;
      ptx::mbarrier_wait(smem_.p_empty[score_ring_.stage], score_ring_.phase ^ 1);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        smem_.p[score_ring_.stage][j][thread()] = {rP[j][0], rP[j][1], rP[j][2], rP[j][3]};
      }
      __syncwarp();  // All lanes have written P and read lse.
      release(smem_.p_full[score_ring_.stage]);
      release(smem_.q_empty[stage]);
      score_ring_.advance();

      ptx::mbarrier_wait(smem_.dout_full[stage], ring_.phase);
      accumulate(rDV, rP, smem_.dout[stage]);
      ring_.advance();
      if (is_last) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(rDV);
        release(smem_.dout_empty[stage]);
        break;
      }
      ptx::mbarrier_wait(smem_.q_full[ring_.stage], ring_.phase);
      multiply(rS, smem_.k, smem_.q[ring_.stage]);
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(rDV);
      release(smem_.dout_empty[stage]);
    }
    // The other consumer has its last dP and P: V's place is free.
    wait_for_both(smem_.p_empty);
  }

  __device__ __forceinline__ void pass_keys(const KeyTilePlace& place, Gradient& rDK) {
    const int warp_row = thread() / 32 * 16;
    Scores rDP;
    Operand rDS;
    ptx::mbarrier_wait(smem_.v_full, key_phase_);
    ptx::mbarrier_wait(smem_.dout_full[ring_.stage], ring_.phase);
    ptx::wgmma_pin(rDK);
    multiply(rDP, smem_.v, smem_.dout[ring_.stage]);
    while (true) {
      const int stage = ring_.stage;
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(rDP);
      ptx::mbarrier_wait(smem_.p_full[score_ring_.stage], score_ring_.phase);
      ptx::mbarrier_wait(smem_.ds_empty[score_ring_.stage], score_ring_.phase ^ 1);
      const device::LdmatrixAddress<ScoreTile> ds_address(
          smem_.ds[score_ring_.stage], device::LdmatrixAddress<ScoreTile>::Order::kRowsFirst,
          warp_row);
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const uint4 p = smem_.p[score_ring_.stage][j][thread()];
        const uint32_t pairs[4] = {p.x, p.y, p.z, p.w};
        differentiate<Element>(rDP, pairs, smem_.delta[stage], j, rDS[j]);
      }
#pragma unroll
      for (int j = 0; j < kGroups; ++j) ptx::stmatrix_x4(ds_address(0, 16 * j), rDS[j]);
      ptx::fence_async_shared();
      __syncwarp();  // All lanes' elements are written and fenced, and P and delta are read.
      release(smem_.ds_full[score_ring_.stage]);
      release(smem_.p_empty[score_ring_.stage]);
      release(smem_.dout_empty[stage]);
      score_ring_.advance();
      ptx::mbarrier_wait(smem_.q_full[stage], ring_.phase);
      const bool is_last = smem_.steps[stage].is_last;
      accumulate(rDK, rDS, smem_.q[stage]);
      ring_.advance();
      if (is_last) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(rDK);
        release(smem_.q_empty[stage]);
        break;
      }
      ptx::mbarrier_wait(smem_.dout_full[ring_.stage], ring_.phase);
      multiply(rDP, smem_.v, smem_.dout[ring_.stage]);
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(rDK);
      release(smem_.q_empty[stage]);
    }
    // dQ is made: K's place is free.
    wait_for_both(smem_.ds_empty);
  }

  // Until both buffers of the score ring were emptied.
  __device__ __forceinline__ void wait_for_both(ptx::Mbarrier (&empty)[2]) {
    Ring<2> ring = score_ring_;
    for (int i = 0; i < 2; ++i, ring.advance()) {
      ptx::mbarrier_wait(empty[ring.stage], ring.phase ^ 1);
    }
  }

  // Writes dV or dK, through the place of V or K.
  template <bool kIsValue>
  __device__ __forceinline__ void store(const KeyTilePlace& place, const Gradient& rD) {
    constexpr int kChunks = kHeadDim / 8;
    if (place.dkv_sum != nullptr) {
      store_sum(place.dkv_sum + (kIsValue ? a_.plan.dkv_elements : 0), rD);
      return;
    }
    const Sequence& s = place.sequence;
    const Tensor& tensor = kIsValue ? a_.p.dv : a_.p.dk;
    const int cols = static_cast<int>(kIsValue ? a_.p.value_dim : a_.p.head_dim);
    const int rows = s.key_rows - s.first_row, col = thread() % kChunks * 8;
    const bool has_steps = place.num_steps > 0;
    KeyTile& tile = kIsValue ? smem_.v : smem_.k;
    const int barrier = kIsValue ? 1 : 2;
    if (has_steps) {
      const float scale = dropout_scale(a_.p.dropout) * (kIsValue ? 1.0f : a_.p.scale);
      stage_gradient<Element>(tile, rD, scale);
      ptx::named_barrier_sync(barrier, 128);  // The tile is written before others copy it.
    }
    Element* destination =
        element_pointer<Element>(tensor, place.batch, s.key_start + s.first_row, place.kv_head);
#pragma unroll 4
    for (int row = thread() / kChunks; row < 64; row += 128 / kChunks) {
      if (row < rows && col < cols) {
        // Without steps the place of K and V may belong to the next tile already.
        uint4 chunk = {};
        if (has_steps) {
          chunk = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(tile.data) +
                                                  KeyTile::offset(row, col));
        }
        *reinterpret_cast<uint4*>(destination + row * tensor.row_stride + col) = chunk;
      }
    }
  }

  const BackwardArguments& a_;
  Smem& smem_;
  Ring<Traits::kStages> ring_;
  Ring<2> score_ring_;
  uint32_t key_phase_ = 0;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    wide_kernel(const __grid_constant__ BackwardArguments a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(shared);
  // NOTE: the shuffle tells the compiler that a warp is of one mind.
  const int warpgroup = __shfl_sync(device::kWarp, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) initialise_wide_barriers<Traits>(smem);
  __syncthreads();  // The barriers exist.
  if (warpgroup == 0) {
    ptx::give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) bring_operands<Traits>(a, smem);
  } else if (warpgroup == 1) {
    ptx::give_registers<Traits::kDqRegisters>();
    make_dq<Traits>(a, smem);
  } else if (warpgroup == 2) {
    ptx::take_registers<Traits::kConsumerRegisters>();
    WideConsumer<Traits>(a, smem).template run<true>();
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    WideConsumer<Traits>(a, smem).template run<false>();
  }
}

}  // namespace jax_flash::attention::sm90
