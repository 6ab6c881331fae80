// The forward kernel for bf16 and fp16 on mma.sync (sm_80 and later):
//   S = Q K^T,   P = 2^(scale_log2 S - m),   O = dropout(P) V / sum P,   lse = log sum exp
// A CTA owns kBlockM queries of one head and walks over the key tiles that they see, last to first.
// A warp owns whole rows of S, so that softmax needs no shared memory and P goes from accumulator
// to operand inside the registers. K and V have two stages: while one is multiplied, cp.async fills
// the other. Launched by forward_sm80, below.
#pragma once

#include "attention/cuda/blocks.cuh"
#include "attention/cuda/dropout.cuh"
#include "attention/cuda/instances.h"
#include "attention/cuda/mask.cuh"
#include "attention/cuda/scheduler.cuh"
#include "attention/cuda/softmax.cuh"
#include "device/element.cuh"
#include "device/shared_tile.cuh"

namespace jax_flash::attention::sm80 {

// Tile sizes. Two CTAs share an SM, so that one multiplies while the other is in softmax; each has
// at most 99 KB of shared memory, what Ada and consumer Ampere have, and 255 registers a thread:
// that is what limits kBlockN, the more so where random bits are drawn. Measured on an H200:
// docs/kernels/log.md.
template <int kHeadDim, bool kHasDropout>
struct ForwardTiles {
  static constexpr int kWarps = 4, kCtasPerSm = 2;
  static constexpr int kBlockM = kHeadDim <= 128 ? 128 : 64;
  static constexpr int kBlockN = kHeadDim <= 64    ? (kHasDropout ? 64 : 128)
                                 : kHeadDim <= 128 ? 64
                                                   : 32;
  static constexpr bool kQueryInRegisters = kHeadDim <= 64 && kHasDropout;
  // NOTE: with head dim 128 the question costs 44 bytes of spills, more than it gives.
  static constexpr bool kWarpsSkip = kHeadDim != 128;
};

template <typename Element_, int kHeadDim_, bool kHasDropout_,
          typename Tiles = ForwardTiles<kHeadDim_, kHasDropout_>>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // of Q, K and V in shared memory; short ones padded
  static constexpr bool kHasDropout = kHasDropout_;

  static constexpr int kBlockM = Tiles::kBlockM, kBlockN = Tiles::kBlockN;
  static constexpr int kCtasPerSm = Tiles::kCtasPerSm, kStages = 2;
  static constexpr bool kQueryInRegisters = Tiles::kQueryInRegisters;
  static constexpr bool kWarpsSkip = Tiles::kWarpsSkip;
  static constexpr int kWarps = Tiles::kWarps, kThreads = 32 * kWarps;
  static constexpr int kWarpM = kBlockM / kWarps;  // rows of a warp
  static constexpr int kFragmentsM = kWarpM / 16;
  static constexpr int kFragmentsN = kBlockN / 8;
  static constexpr int kFragmentsD = kHeadDim / 8;

  using Walk = TileWalk<kBlockM, kBlockN, Axis::kQuery, -1>;

  // What this CTA works on: here and not in registers, because the main loop rarely looks at it.
  struct Job {
    Sequence s;
    TileRange range;
    BlockMask blocks;
    Dropout dropout;
    const Element *q, *k, *v;  // row 0 of the sequence, this head
    Element* o;
    float* lse;
    typename Walk::Window window[kWarps];
  };
  using QueryTile = device::SharedTile<kBlockM, kHeadDim>;
  using KeyTile = device::SharedTile<kBlockN, kHeadDim>;  // values too
  struct Stage {
    KeyTile key, value;
  };
  struct Smem {
    QueryTile query;  // at the end: O on its way out
    Stage stage[kStages];
    Job job;
  };
  static_assert(sizeof(Smem) <= 99 * 1024);
};

// For a scale that is not positive: Q -> -Q, or Q -> 0, so that the kernel may work with scale_log2
// = |scale| log2(e), or 1, and the maximum of S is that of scale S.
template <typename Traits>
__device__ void fold_scale_sign(typename Traits::Smem& smem, float scale) {
  auto* pairs = reinterpret_cast<uint32_t*>(smem.query.data);
  for (int i = threadIdx.x; i < Traits::kBlockM * Traits::kHeadDim / 2; i += Traits::kThreads) {
    pairs[i] = scale < 0.0f ? pairs[i] ^ 0x80008000u : 0u;
  }
}

template <typename Traits>
__device__ void find_job(const ForwardParams& p, const Schedule& schedule,
                         typename Traits::Job& job) {
  using Element = typename Traits::Element;
  const Work work(schedule, blockIdx.x);
  const BatchIndex batch(p, work.batch);
  const Sequence s = find_sequence(p, batch, Axis::kQuery, Traits::kBlockM, work.slot);
  if (threadIdx.x == 0) {
    job = {.s = s,
           .range = key_tiles<Traits::kBlockM, Traits::kBlockN>(s, s.first_row),
           .blocks = BlockMask(p.mask, batch, work.head),
           .dropout = Dropout(p.dropout, p.num_sequences, batch, s, work.head),
           .q = element_pointer<Element>(p.q, batch, s.query_start, work.head),
           .k = element_pointer<Element>(p.k, batch, s.key_start, work.kv_head),
           .v = element_pointer<Element>(p.v, batch, s.key_start, work.kv_head),
           .o = element_pointer<Element>(p.o, batch, s.query_start, work.head),
           .lse = row_pointer(p.lse, batch, s.query_start, work.head)};
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardParams p,
                   const __grid_constant__ Schedule schedule, const float scale_log2) {
  using Element = typename Traits::Element;
  using QueryTile = typename Traits::QueryTile;
  using KeyTile = typename Traits::KeyTile;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr int kFragmentsM = Traits::kFragmentsM, kFragmentsD = Traits::kFragmentsD;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(smem_bytes);

  // Find this CTA's rows: warp 0 for all.
  auto& job = smem.job;
  if (threadIdx.x < 32) find_job<Traits>(p, schedule, job);
  __syncthreads();  // publishes the job
  const Sequence& s = job.s;
  if (s.slot_is_empty(Axis::kQuery)) return;
  const typename Traits::Walk walk(job.range, job.blocks, s, job.window[threadIdx.x / 32]);

  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * Traits::kWarpM;
  const auto load_key_value = [&](auto& stage, int row) {
    using Loader = device::TileLoader<KeyTile, Traits::kThreads>;
    Loader(job.k, p.k.row_stride, s.key_length, p.head_dim)(stage.key, row);
    Loader(job.v, p.v.row_stride, s.key_length, p.value_dim)(stage.value, row);
    ptx::cp_async_commit();
  };
  [[maybe_unused]] const int dropout_row = s.first_row + warp_row;
  float rO[kFragmentsM][kFragmentsD][4] = {};

  using QueryAddress = device::LdmatrixAddress<QueryTile>;
  using KeyAddress = device::LdmatrixAddress<KeyTile>;
  const QueryAddress query_address(smem.query, QueryAddress::Order::kRowsFirst, warp_row);
  const KeyAddress key_address(smem.stage[0].key, KeyAddress::Order::kColsFirst);
  const KeyAddress value_address(smem.stage[0].value, KeyAddress::Order::kRowsFirst);
  uint32_t rQ[Traits::kQueryInRegisters ? Traits::kHeadDim / 16 : 1][kFragmentsM][4];
  const auto load_fragments = [&](uint32_t (&fragments)[kFragmentsM][4], int k) {
#pragma unroll
    for (int m = 0; m < kFragmentsM; ++m) {
      ptx::ldmatrix_x4(fragments[m], query_address(16 * m, k));
    }
  };

  // Start the copies of Q and of the first K and V.
  TileStep step = walk.first();
  if (!step.is_end()) {
    const device::TileLoader<QueryTile, Traits::kThreads> load_query(job.q, p.q.row_stride,
                                                                     s.query_length, p.head_dim);
    load_query(smem.query, s.first_row);
    ptx::cp_async_commit();
    load_key_value(smem.stage[0], step.tile() * kBlockN);
    const bool is_positive = p.scale > 0.0f;
    if (Traits::kQueryInRegisters || !is_positive) {
      ptx::cp_async_wait<1>();
      __syncthreads();  // Q, copied by all threads, is visible
    }
    if (!is_positive) {
      fold_scale_sign<Traits>(smem, p.scale);
      __syncthreads();  // so is the change
    }
    if constexpr (Traits::kQueryInRegisters) {
#pragma unroll
      for (int k = 0; k < Traits::kHeadDim; k += 16) load_fragments(rQ[k / 16], k);
    }
  }
  OnlineSoftmax<kFragmentsM> softmax(scale_log2);

  for (int stage = 0; !step.is_end(); stage ^= 1) {
    const TileStep next_step = walk.next(step);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage's K and V are visible, and nobody reads the other stage any more

    // Start the copies of the next K and V.
    if (!next_step.is_end()) load_key_value(smem.stage[stage ^ 1], next_step.tile() * kBlockN);
    const uint32_t stage_offset = stage * sizeof(typename Traits::Stage);

    // Skip what this warp sees nothing of, such as the keys above the diagonal for its upper rows.
    if (Traits::kWarpsSkip && !step.is_full() &&
        !sees_anything<Traits::kWarpM, kBlockN>(s, job.blocks, s.first_row + warp_row,
                                                step.tile() * kBlockN)) {
      step = next_step;
      continue;  // to the barrier
    }

    // S = Q K^T
    float rS[kFragmentsM][Traits::kFragmentsN][4] = {};
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim; k += 16) {
      constexpr bool kReload = !Traits::kQueryInRegisters;
      const int kept = kReload ? 0 : k / 16;
      if (kReload) load_fragments(rQ[0], k);
#pragma unroll
      for (int n = 0; n < kBlockN; n += 16) {
        uint32_t rK[4];
        ptx::ldmatrix_x4(rK, key_address(n, k, stage_offset));
#pragma unroll
        for (int m = 0; m < kFragmentsM; ++m) {
          ptx::mma_16x8x16<Element>(rS[m][n / 8], rQ[kept][m], rK[0], rK[1]);
          ptx::mma_16x8x16<Element>(rS[m][n / 8 + 1], rQ[kept][m], rK[2], rK[3]);
        }
      }
    }

    // P = softmax numerator of S
    const int col = step.tile() * kBlockN;
    if (!step.is_full()) mask_scores(rS, s, job.blocks, s.first_row + warp_row, col);
    softmax.update(rS, rO);

    // O += dropout(P) V
#pragma unroll
    for (int n = 0; n < kBlockN; n += 16) {
      uint32_t rP[kFragmentsM][4];
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m) {
        float (&left)[4] = rS[m][n / 8];
        float (&right)[4] = rS[m][n / 8 + 1];
        if constexpr (Traits::kHasDropout) {
          job.dropout.apply(left, right, dropout_row + 16 * m, col + n);
        }
        device::pack_operand<Element>(rP[m], left, right);
      }
#pragma unroll
      for (int d = 0; d < Traits::kHeadDim; d += 16) {
        uint32_t rV[4];
        ptx::ldmatrix_x4_trans(rV, value_address(n, d, stage_offset));
#pragma unroll
        for (int m = 0; m < kFragmentsM; ++m) {
          ptx::mma_16x8x16<Element>(rO[m][d / 8], rP[m], rV[0], rV[1]);
          ptx::mma_16x8x16<Element>(rO[m][d / 8 + 1], rP[m], rV[2], rV[3]);
        }
      }
    }
    step = next_step;
  }

  // Normalise, and write lse.
  softmax.finish();
  const float keep_scale = Traits::kHasDropout ? dropout_scale(p.dropout) : 1.0f;
#pragma unroll
  for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = s.first_row + warp_row + 16 * m + 8 * half + lane / 4;
      const bool takes_part = row < s.query_length;
      const float factor = takes_part ? softmax.normalizer(m, half) * keep_scale : 0.0f;
#pragma unroll
      for (int d = 0; d < kFragmentsD; ++d) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {  // 0 times a NaN of V is no zero
          rO[m][d][e] = factor == 0.0f ? 0.0f : rO[m][d][e] * factor;
        }
      }
      if (lane % 4 == 0 && row < s.query_rows) {
        job.lse[row] = takes_part ? softmax.lse(m, half) : -INFINITY;
      }
    }
  }

  // Write O through the rows of sQ that only this warp reads: 16 bytes a lane.
#pragma unroll
  for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
    for (int d = 0; d < kFragmentsD; ++d) {
      const int row = warp_row + 16 * m + lane / 4;
      char* chunk =
          reinterpret_cast<char*>(smem.query.data) + QueryTile::offset(row, 8 * d) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(chunk) = device::pack<Element>(rO[m][d][0], rO[m][d][1]);
      *reinterpret_cast<uint32_t*>(chunk + 8 * QueryTile::kRowBytes) =
          device::pack<Element>(rO[m][d][2], rO[m][d][3]);
    }
  }
  __syncwarp();  // O, written by the lanes of a quad, is read by others
  Element* gO = job.o + s.first_row * p.o.row_stride;
  constexpr int kChunks = Traits::kHeadDim / 8;
#pragma unroll
  for (int i = lane; i < Traits::kWarpM * kChunks; i += 32) {
    const int row = warp_row + i / kChunks, col = i % kChunks * 8;
    if (s.first_row + row < s.query_rows && col < p.value_dim) {
      *reinterpret_cast<uint4*>(gO + row * p.o.row_stride + col) = *reinterpret_cast<const uint4*>(
          reinterpret_cast<const char*>(smem.query.data) + QueryTile::offset(row, col));
    }
  }
}

template <typename Traits>
const char* launch(const ForwardParams& p, cudaStream_t stream) {
  const Schedule schedule = forward_schedule(p, Traits::kBlockM, sizeof(typename Traits::Element));
  if (schedule.num_ctas(p) > INT32_MAX) return "jax_flash: query: too many tiles for one launch";
  constexpr int kSmemBytes = sizeof(typename Traits::Smem);
  const auto kernel = forward_kernel<Traits>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes) !=
      cudaSuccess) {
    return launch_status();
  }
  kernel<<<static_cast<uint32_t>(schedule.num_ctas(p)), Traits::kThreads, kSmemBytes, stream>>>(
      p, schedule, p.scale == 0.0f ? 1.0f : std::abs(p.scale) * 1.44269504088896341f);
  return launch_status();
}

}  // namespace jax_flash::attention::sm80

namespace jax_flash::attention {

template <typename Element, int kHeadDim>
const char* forward_sm80(const ForwardParams& p, cudaStream_t stream) {
  return p.dropout.threshold > 0
             ? sm80::launch<sm80::ForwardTraits<Element, kHeadDim, true>>(p, stream)
             : sm80::launch<sm80::ForwardTraits<Element, kHeadDim, false>>(p, stream);
}

}  // namespace jax_flash::attention
