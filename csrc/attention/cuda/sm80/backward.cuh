// dV = P^T dO,  dK = scale dS^T Q,  dQ += dS K   with   P = exp(scale Q K^T - lse),
//                                                       dS = P * (dO V^T - delta).
// Called by launch_backward.cu between preprocess.cuh (lse and delta of every row, dQ zeroed) and
// postprocess.cuh (dQ to 16 bits). One CTA owns a tile of keys: K and V stay in shared memory, dK
// and dV in registers, and the query tiles of every head of the group pass by. P and dS cross
// shared memory as 16-bit tiles, because three products want them with other axes across lanes.
//
// A step has two halves, recompute() (two products and the exponential) and accumulate() (three
// products). docs/kernels/backward_sm80.md shows how they overlap.
#pragma once

#include "attention/cuda/backward_walk.cuh"
#include "attention/cuda/blocks.cuh"
#include "attention/cuda/dropout.cuh"
#include "attention/cuda/mask.cuh"
#include "attention/cuda/seqlen.cuh"
#include "attention/cuda/sm80/preprocess.cuh"
#include "attention/cuda/sm80/tile_copy.cuh"
#include "attention/cuda/sm80/warp_product.cuh"
#include "device/element.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::attention::sm80 {

template <typename Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kStages_,
          bool kIsStaggered_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;  // queries of a step
  static constexpr int kBlockN = kBlockN_;  // keys of the CTA
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kMinCtas =
      kWarps == 4 ? 2 : 1;                  // a multiprocessor: 8 warps of 255 registers
  static constexpr int kStages = kStages_;  // Q and dO tiles in shared memory
  static constexpr bool kIsStaggered = kIsStaggered_;
  static constexpr int kScoreStages = kIsStaggered ? 2 : 1;  // P and dS tiles
  static_assert(!kIsStaggered || kStages == 3);

  // How the warps share the result of each product.
  static constexpr int kDimWarps = kHeadDim >= 256 ? 4 : kHeadDim / 64;
  using ScoreWarps = WarpGrid<kBlockM, kBlockN, 2, kWarps / 2>;                 // S, dP
  using KeyWarps = WarpGrid<kBlockN, kHeadDim, kWarps / kDimWarps, kDimWarps>;  // dK, dV
  using QueryWarps = WarpGrid<kBlockM, kHeadDim, 2, kWarps / 2>;                // dQ

  using KeyTile = device::SharedTile<kBlockN, kHeadDim>;
  using QueryTile = device::SharedTile<kBlockM, kHeadDim>;
  using ScoreTile = device::SharedTile<kBlockM, (kBlockN < 64 ? 64 : kBlockN)>;  // 64-column slabs
  struct Smem {
    KeyTile k, v;  // in the end: dK and dV on their way out
    QueryTile q[kStages], dout[kStages];
    ScoreTile p[kScoreStages], ds[kScoreStages];
    float2 stats[kStages][kBlockM];  // lse * log2(e), delta
    BackwardPlace place;
    BackwardStep steps[4];  // a ring, filled by the first warp
  };
};

// Gives the dropped elements of 16 rows of P a minus sign; (row, col) is their first.
template <int kN>
__device__ __forceinline__ void negate_dropped(float (&rP)[kN][4], const Dropout& dropout, int row,
                                               int col) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    const Philox4 bits = dropout.bits(row, col + 8 * n);
    const uint32_t words[4] = {bits.x, bits.z, bits.y, bits.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float* pair = &rP[n + word / 2][word % 2 * 2];
      if (!dropout.keeps_even(words[word])) pair[0] = -pair[0];
      if (!dropout.keeps_odd(words[word])) pair[1] = -pair[1];
    }
  }
}

// max(x, 0) of both elements; NaN stays.
template <typename Element>
__device__ __forceinline__ uint32_t positive_part(uint32_t pair) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  const Pair result = __hmax2_nan(reinterpret_cast<const Pair&>(pair), Pair{});
  return reinterpret_cast<const uint32_t&>(result);
}

template <class Traits, bool kHasDropout>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    backward_kernel(const __grid_constant__ BackwardArguments a) {
  using Element = typename Traits::Element;
  using ScoreWarps = typename Traits::ScoreWarps;
  using KeyWarps = typename Traits::KeyWarps;
  using QueryWarps = typename Traits::QueryWarps;
  using KeyTile = typename Traits::KeyTile;
  using QueryTile = typename Traits::QueryTile;
  using ScoreTile = typename Traits::ScoreTile;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(shared);
  const BackwardParams& p = a.p;
  const BackwardPlan& plan = a.plan;
  BackwardPlace& place = smem.place;

  for (int slot = static_cast<int>(blockIdx.x % plan.key_stride); slot < plan.key_slots;) {
    if (threadIdx.x < 32) {
      const BackwardPlace found = BackwardPlace::find<kBlockM, kBlockN>(a, blockIdx.x, slot);
      if (threadIdx.x == 0) place = found;
      __syncwarp();  // The place is written before its lanes read it.
      for (int i = 0; i < 3; ++i) next_step<kBlockM, kBlockN>(p, place, smem.steps[i]);
    }
    __syncthreads();  // The place and the first steps are written.
    const Sequence& s = place.sequence;

    // Where step i lies in the rings. NOTE: opaque, since the addresses that follow from it are
    // worth no registers between their uses.
    const auto step_of = [&](int i) -> const BackwardStep& { return smem.steps[opaque(i) % 4]; };
    const auto stage_of = [&](int i) { return opaque(i) % Traits::kStages; };
    const auto scores_of = [&](int i) { return opaque(i) % Traits::kScoreStages; };

    // The tile of a step in [batches, heads, query_slots].
    const auto query_tile = [&](const BackwardStep& step) {
      return place.query_tile + step.head * plan.query_slots + step.row / kBlockM;
    };

    // Starts the copies of step i's operands.
    const auto load = [&](int i) {
      const BackwardStep& step = step_of(i);
      const int row = s.query_start + step.row, rows = s.query_length - step.row;
      load_rows<kThreads>(smem.q[stage_of(i)],
                          element_pointer<Element>(p.q, place.batch, row, step.head),
                          p.q.row_stride, rows, static_cast<int>(p.head_dim));
      load_rows<kThreads>(smem.dout[stage_of(i)],
                          element_pointer<Element>(p.dout, place.batch, row, step.head),
                          p.dout.row_stride, rows, static_cast<int>(p.value_dim));
      if (const int thread = opaque(threadIdx.x); thread < kBlockM / 2) {
        const float2* stats = plan.stats + query_tile(step) * kBlockM;
        ptx::cp_async_16(ptx::shared_address(&smem.stats[stage_of(i)][2 * thread]),
                         stats + 2 * thread, 16);
      }
    };

    // P and dS of step i into shared memory, from Q, K, V, dO and the rows' lse and delta.
    auto recompute = [&](int i) {
      // S = Q K^T
      typename ScoreWarps::Accumulator rP = {};
      multiply_add<Element, kHeadDim>(
          rP, Operand<QueryTile, false>(smem.q[stage_of(i)], rows_first(), ScoreWarps::row()),
          Operand<KeyTile, false>(smem.k, cols_first(), ScoreWarps::col()));

      // P = exp(scale S - lse). A partial tile is scaled before it is masked: -inf * scale would be
      // wrong for a scale that is not positive.
      float factor = p.scale * 1.4426950408889634f;
      if (const BackwardStep& step = step_of(i); !step.is_full) {
#pragma unroll
        for (int i = 0; i < ScoreWarps::kSize; ++i) (&rP[0][0][0])[i] *= factor;
        factor = 1.0f;
        mask_scores(rP, s, BlockMask(p.mask, place.batch, step.head), step.row + ScoreWarps::row(),
                    s.first_row + ScoreWarps::col());
      }
      // P waits for dP in registers or, where they are short, in its lane's own places of shared
      // memory: P's, or with dropout those that dS will take. A dropped element carries a minus
      // sign.
      constexpr bool kParksP = ScoreWarps::kSize > 32;
      const auto stats = [&](int m, int half) -> const float2& {
        return smem.stats[stage_of(i)][ScoreWarps::row() + lane_id() / 4 + 16 * m + 8 * half];
      };
#pragma unroll
      for (int m = 0; m < ScoreWarps::kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float lse_log2 = stats(m, half).x;
#pragma unroll
          for (int n = 0; n < ScoreWarps::kN; ++n) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              rP[m][n][e] = ptx::exp2_approx(rP[m][n][e] * factor - lse_log2);
            }
          }
        }
        if constexpr (kHasDropout) {
          const BackwardStep& step = step_of(i);
          const Dropout dropout(p.dropout, p.num_sequences, place.batch, s, step.head);
          negate_dropped(rP[m], dropout, step.row + ScoreWarps::row() + 16 * m,
                         s.first_row + ScoreWarps::col());
        }
        for_fragments<ScoreWarps>(smem.p[scores_of(i)], m, [&](int n, int half, uint32_t& pair) {
          pair = device::pack<Element>(rP[m][n][2 * half], rP[m][n][2 * half + 1]);
          if constexpr (kHasDropout) pair = positive_part<Element>(pair);
        });
        if constexpr (kParksP && kHasDropout) {
          for_fragments<ScoreWarps>(smem.ds[scores_of(i)], m, [&](int n, int half, uint32_t& pair) {
            pair = device::pack<Element>(rP[m][n][2 * half], rP[m][n][2 * half + 1]);
          });
        }
      }
      if constexpr (kParksP) {
        __syncwarp();  // Keeps the compiler from holding on to P; the lanes share nothing here.
      }

      // dS = P * (dO V^T - delta)
      typename ScoreWarps::Accumulator rDP = {};
      multiply_add<Element, kHeadDim>(
          rDP, Operand<QueryTile, false>(smem.dout[stage_of(i)], rows_first(), ScoreWarps::row()),
          Operand<KeyTile, false>(smem.v, cols_first(), ScoreWarps::col()));
#pragma unroll
      for (int m = 0; m < ScoreWarps::kM; ++m) {
        const float delta[2] = {stats(m, 0).y, stats(m, 1).y};
        const auto gradient = [&](float x, float dp, int half) {
          if constexpr (kHasDropout) return fabsf(x) * ((x < 0.0f ? 0.0f : dp) - delta[half]);
          return x * (dp - delta[half]);
        };
        if constexpr (kParksP) {
          auto& parked = kHasDropout ? smem.ds[scores_of(i)] : smem.p[scores_of(i)];
          for_fragments<ScoreWarps>(parked, m, [&](int n, int half, uint32_t& pair) {
            const float2 x = device::unpack<Element>(pair);
            rP[m][n][2 * half] = x.x;
            rP[m][n][2 * half + 1] = x.y;
          });
        }
        for_fragments<ScoreWarps>(smem.ds[scores_of(i)], m, [&](int n, int half, uint32_t& pair) {
          const int e = 2 * half;
          pair = device::pack<Element>(gradient(rP[m][n][e], rDP[m][n][e], half),
                                       gradient(rP[m][n][e + 1], rDP[m][n][e + 1], half));
        });
      }
    };

    typename KeyWarps::Accumulator rDK = {}, rDV = {};
    auto accumulate = [&](int i) {
      // dV += P^T dO
      multiply_add<Element, kBlockM>(
          rDV, Operand<ScoreTile, true>(smem.p[scores_of(i)], cols_first(), KeyWarps::row()),
          Operand<QueryTile, true>(smem.dout[stage_of(i)], rows_first(), KeyWarps::col()));
      // dQ += dS K
      typename QueryWarps::Accumulator rDQ = {};
      multiply_add<Element, kBlockN>(
          rDQ, Operand<ScoreTile, false>(smem.ds[scores_of(i)], rows_first(), QueryWarps::row()),
          Operand<KeyTile, true>(smem.k, rows_first(), QueryWarps::col()));
      float* dq =
          place.dq_sum + query_tile(step_of(i)) * (kBlockM * kHeadDim) + opaque(threadIdx.x);
#pragma unroll
      for (int r = 0; r < QueryWarps::kSize; ++r) {
        ptx::red_add(dq + r * kThreads, (&rDQ[0][0][0])[r]);
      }
      // dK += dS^T Q
      multiply_add<Element, kBlockM>(
          rDK, Operand<ScoreTile, true>(smem.ds[scores_of(i)], cols_first(), KeyWarps::row()),
          Operand<QueryTile, true>(smem.q[stage_of(i)], rows_first(), KeyWarps::col()));
    };

    // K and V arrive together with the first step.
    if (smem.steps[0].exists()) {
      const int row = s.key_start + s.first_row, rows = s.key_length - s.first_row;
      load_rows<kThreads>(smem.k, element_pointer<Element>(p.k, place.batch, row, place.kv_head),
                          p.k.row_stride, rows, static_cast<int>(p.head_dim));
      load_rows<kThreads>(smem.v, element_pointer<Element>(p.v, place.batch, row, place.kv_head),
                          p.v.row_stride, rows, static_cast<int>(p.value_dim));
      load(0);
    }
    ptx::cp_async_commit();
    if constexpr (Traits::kIsStaggered) {
// Two turns a step: half of the warps recompute step i + 1 and then accumulate step i, the other
// half the other way round. In the first round there is no step to accumulate yet.
#pragma unroll 1
      for (int turn = -2; turn < 0 || step_of(turn / 2).exists(); ++turn) {
        const int i = turn >> 1;
        if (turn % 2 == 0) {
          ptx::cp_async_wait<0>();
          // This step's P and dS are written and the next step's operands have arrived. The
          // previous step is finished: its place in every ring is free.
          __syncthreads();
          if (step_of(i + 2).exists()) load(i + 2);
          ptx::cp_async_commit();
          if (i >= 0 && threadIdx.x < 32) {
            next_step<kBlockM, kBlockN>(p, place, smem.steps[(i + 3) % 4]);
          }
        }
        if ((turn % 2 == 0) == (opaque(threadIdx.x) < kThreads / 2)) {
          if (step_of(i + 1).exists()) recompute(i + 1);
        } else if (i >= 0) {
          accumulate(i);
        }
      }
    } else {
#pragma unroll 1
      for (int i = 0; step_of(i).exists(); ++i) {
        ptx::cp_async_wait<0>();
        // The step's operands have arrived. The previous step has left P, dS and its stage.
        __syncthreads();
        if (Traits::kStages > 1 && step_of(i + 1).exists()) load(i + 1);
        ptx::cp_async_commit();
        if (threadIdx.x < 32) next_step<kBlockM, kBlockN>(p, place, smem.steps[(i + 3) % 4]);
        recompute(i);
        __syncthreads();  // P and dS are written.
        accumulate(i);
        if constexpr (Traits::kStages == 1) {
          __syncthreads();  // Everyone has read Q and dO.
          if (step_of(i + 1).exists()) load(i + 1);
          ptx::cp_async_commit();
        }
      }
    }

    // dK and dV leave: whole, or as one of several sums.
    if (s.slot_is_empty(Axis::kKey)) {
      // A slot without rows.
    } else if (plan.key_splits > 1) {
      float* sum = place.dkv_sum + opaque(threadIdx.x);
#pragma unroll
      for (int i = 0; i < KeyWarps::kSize; ++i) {
        sum[i * kThreads] = (&rDK[0][0][0])[i];
        sum[plan.dkv_elements + i * kThreads] = (&rDV[0][0][0])[i];
      }
    } else {
      const float dropout = dropout_scale(p.dropout);
      const int first_row = s.key_start + s.first_row, rows = s.key_rows - s.first_row;
      __syncthreads();  // Everyone has read K and V.
      store_accumulator<Element, KeyWarps>(smem.k, rDK, p.scale * dropout);
      store_accumulator<Element, KeyWarps>(smem.v, rDV, dropout);
      __syncthreads();  // dK and dV are written before other threads copy them.
      copy_rows<kThreads>(element_pointer<Element>(p.dk, place.batch, first_row, place.kv_head),
                          p.dk.row_stride, smem.k, rows, static_cast<int>(p.head_dim));
      copy_rows<kThreads>(element_pointer<Element>(p.dv, place.batch, first_row, place.kv_head),
                          p.dv.row_stride, smem.v, rows, static_cast<int>(p.value_dim));
    }
    slot = place.slot + static_cast<int>(plan.key_stride);
    __syncthreads();  // Shared memory is free for the next key tile.
  }
}

}  // namespace jax_flash::attention::sm80
