// The launch of the Hopper forward kernel.
#pragma once

#include <cmath>

#include "attention/cuda/architecture.h"
#include "attention/cuda/sm90/forward.cuh"

namespace jax_flash::attention::sm90 {

// Are the tiles of different cost? Then CTAs take the next one when they are done with the last.
inline bool has_uneven_tiles(const Problem& p) {
  const MaskParams& mask = p.mask;
  return mask.window_right < p.seq_k || mask.window_left < p.seq_k || mask.varlen ||
         mask.query_lengths.data != nullptr || mask.key_lengths.data != nullptr ||
         mask.block_mask.data != nullptr;
}

// Keys that a job of block_m queries sees, on average.
inline int64_t mean_keys_of_job(const Problem& p, int block_m) {
  const int64_t sequences = p.mask.varlen ? std::max<int64_t>(p.num_sequences, 1) : 1;
  const int64_t keys = std::min(p.seq_k / sequences, p.mask.window_left + block_m);
  return p.mask.window_right < keys ? (keys + block_m) / 2 : keys;
}

// How many jobs a CTA may have taken and not finished. Each one beyond the first is on its way
// while another is worked on, which takes about 3 us, and is out of the others' reach, which costs
// balance. H200, causal, TFLOP/s with 2, 3, 4 at T = 512, 1024, 2048, 4096: head dim 64 174 216
// 223, 276 292 297, 382 390 380, 439 434 433; 128 243 301 299, 388 412 397, 515 505 484, 605 583
// 580; 256 305 299 292, 420 393 384, 517 488 466, 618 572 533.
inline uint32_t jobs_ahead(const Problem& p, int block_m) {
  const int64_t seen = mean_keys_of_job(p, block_m);
  const int64_t clocks = 2 * block_m * seen * (p.head_dim + p.value_dim) / 4096;  // of the products
  return clocks >= 10000 ? 2 : clocks >= 5000 ? 3 : 4;
}

// The lightest slots of all heads come last, to fill what the heads before leave uneven: one taker
// of tiles is ahead of another by half of a head's longest tile, of `slots` units, and the last n
// slots of a head are n^2 / 2 units. Not more, since their keys must be read again.
inline int32_t tail_slots(const Problem& p, const Schedule& schedule, int takers) {
  const uint32_t heads = schedule.heads_of_all;
  if (!schedule.is_descending || p.mask.varlen || p.mask.window_left < p.seq_k ||
      heads <= static_cast<uint32_t>(schedule.group)) {
    return 0;
  }
  const auto tail = static_cast<int32_t>(std::sqrt(double(takers) * schedule.slots / heads));
  return std::min(tail, schedule.slots / 2);
}

// Head dims 192 and 256 have one Q at a time: the last P V of a job is better done while the next Q
// and K come. H200, 2026-11-28, head dim 256, with over without, T = 512, 1024, 2048, 4096, 8192,
// 16384: full 1.09, 1.06, 1.03, 1.02, 1.01, 1.01; causal (512, 2048, 8192, 16384) 1.05, 1.02, 1.02,
// 1.01. Long jobs of head dim 192: full (4096, 8192) 1.02, 1.01, causal (8192) 0.96.
inline constexpr int64_t kShortJob = 2560;
inline bool ends_alone(const Problem& p, int block_m) {
  return p.head_dim > 192 || mean_keys_of_job(p, block_m) <= kShortJob;
}

// Does every warpgroup see something of the last step of every job? Else one begins the next job
// with nothing under way, as teams (ForwardTraits::kTeams) have no room to guess there, and which
// job comes next is a matter of chance: the bits of a job must not depend on that.
inline bool all_warpgroups_end(const ForwardParams& p) {
  const MaskParams& mask = p.mask;
  return !mask.varlen && mask.query_lengths.data == nullptr && mask.key_lengths.data == nullptr &&
         mask.causal_offset.data == nullptr && mask.block_mask.data == nullptr &&
         mask.window_left >= p.seq_q && mask.window_right >= 0 && p.seq_q == p.seq_k &&
         (p.seq_q + 63) / 64 % 2 == 0;
}

template <typename Traits>
const char* launch_forward(const ForwardParams& p, cudaStream_t stream) {
  if (!(p.scale > 0.0f)) return kNotCovered;  // the softmax takes its maximum over S
  if (p.seq_k / Traits::kBlockN >= Step::kMaxTiles) return kNotCovered;
  // The heaviest tiles of all heads first: groups of heads that fit L2 cost more in balance than
  // they save. H200, causal, T = 16384, over cuDNN, groups of 16, 32, 64 MB and none: 1.08, 1.18,
  // 1.25, 1.35 with head dim 128; 0.92, 1.03, 1.06, 1.19 with 256.
  constexpr int64_t kNoLimit = INT64_MAX;
  ForwardArguments a{.p = p,
                     .schedule = forward_schedule(p, Traits::kBlockM, 2, kNoLimit),
                     .num_tiles = 0,
                     .guesses = all_warpgroups_end(p),
                     .lead = jobs_ahead(p, Traits::kBlockM),
                     .counter = -1,
                     .scale_log2 = p.scale * 1.44269504088896341f,
                     .zero = 0,
                     .ends_alone = ends_alone(p, Traits::kBlockM)};
  if (!make_operand_map(p, p.q, p.seq_q, p.heads, p.head_dim, Traits::kBlockM, a.q) ||
      !make_operand_map(p, p.k, p.seq_k, p.kv_heads, p.head_dim, Traits::kBlockN, a.k) ||
      !make_operand_map(p, p.v, p.seq_k, p.kv_heads, p.value_dim, Traits::kBlockN, a.v) ||
      !make_operand_map(p, p.o, p.seq_q, p.heads, p.value_dim, 16, a.o)) {
    return kNotCovered;
  }
  const int64_t tiles = a.schedule.num_ctas(p);
  if (tiles > INT32_MAX) return "jax_flash: query: too many tiles for one launch";
  a.num_tiles = static_cast<uint32_t>(tiles);
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  a.schedule.tail = tail_slots(p, a.schedule, Traits::kTeams * multiprocessors);
  constexpr int kSmemBytes = Traits::kTeams * sizeof(typename Traits::Smem);
  const auto kernel = forward_kernel<Traits>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes) !=
      cudaSuccess) {
    return launch_status();
  }
  if (has_uneven_tiles(p)) a.counter = take_tile_counter(stream);
  const auto ctas = static_cast<uint32_t>(std::min<int64_t>(tiles, multiprocessors));
  // The kernel begins while the one before it in the stream still ends. H200, T = 512: 1.04 to 1.06
  // times as fast.
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = ctas;
  config.blockDim = Traits::kThreads;
  config.dynamicSmemBytes = kSmemBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, a);
  return error == cudaSuccess ? launch_status() : cudaGetErrorString(error);
}

// Tiles by head dims: warpgroups of 64 queries, keys a step, stages of K and of V, Q in registers,
// stages of Q. docs/kernels/hopper_forward.md has the arithmetic and the measurements. Where
// random bits are drawn, they need the registers that are changed here.
template <int kHeadDim, int kValueDim, bool kHasDropout>
struct ForwardForm;
template <bool kHasDropout>
struct ForwardForm<64, 64, kHasDropout> {
  using Tiles = ForwardTiles<64, 64, kHasDropout ? 2 : 3, 128, 4, 4, false, 2>;
};
template <bool kHasDropout>
struct ForwardForm<96, 96, kHasDropout> {
  using Tiles = ForwardTiles<96, 96, 2, 128, 2, 2, true, 1>;
};
template <bool kHasDropout>
struct ForwardForm<128, 128, kHasDropout> {
  using Tiles =
      ForwardTiles<128, 128, 2, 128, kHasDropout ? 2 : 3, 2, !kHasDropout, kHasDropout ? 2 : 1>;
};
template <bool kHasDropout>
struct ForwardForm<192, 128, kHasDropout> {
  using Tiles = ForwardTiles<192, 128, 2, kHasDropout ? 96 : 128, 2, 2, false, 1>;
};
template <bool kHasDropout>
struct ForwardForm<192, 192, kHasDropout> {
  using Tiles = ForwardTiles<192, 192, 2, 96, 2, 2, false, 1>;
};
template <bool kHasDropout>
struct ForwardForm<256, 256, kHasDropout> {
  using Tiles = ForwardTiles<256, 256, 2, 64, 2, 2, false, 1>;
};

// Short sequences at head dim 64: tiles of 192 queries would hang over their ends, and a job is a
// few steps. Under a mask bf16 has two teams, so that one's beginnings and ends of jobs run under
// the other's steps; fp16, which looks for maxima, spills there.
inline constexpr int64_t kShortFull = 1024;
using ShortFullTiles = ForwardTiles<64, 64, 4, 64, 4, 4, false, 2>;
template <typename Element>
struct ShortMasked {
  static constexpr int64_t kRows = 2048;
  using Tiles = ForwardTiles<64, 64, 2, 128, 4, 4, true, 1>;
};
template <>
struct ShortMasked<__nv_bfloat16> {
  static constexpr int64_t kRows = 4096;
  using Tiles = ForwardTiles<64, 64, 2, 64, 4, 4, false, 2, 2>;
};

}  // namespace jax_flash::attention::sm90

namespace jax_flash::attention {

template <typename Element, int kHeadDim, int kValueDim>
const char* forward_sm90(const ForwardParams& p, cudaStream_t stream) {
  using namespace sm90;
  if (p.dropout.threshold > 0) {
    using Tiles = typename ForwardForm<kHeadDim, kValueDim, true>::Tiles;
    return launch_forward<ForwardTraits<Element, Tiles, true>>(p, stream);
  }
  if constexpr (kHeadDim == 64) {
    const int64_t rows = p.mask.varlen ? p.seq_q / std::max<int64_t>(p.num_sequences, 1) : p.seq_q;
    if (rows <= ShortMasked<Element>::kRows && has_uneven_tiles(p)) {
      using Tiles = typename ShortMasked<Element>::Tiles;
      return launch_forward<ForwardTraits<Element, Tiles, false>>(p, stream);
    }
    if (rows <= kShortFull && !has_uneven_tiles(p)) {
      return launch_forward<ForwardTraits<Element, ShortFullTiles, false>>(p, stream);
    }
  }
  using Tiles = typename ForwardForm<kHeadDim, kValueDim, false>::Tiles;
  return launch_forward<ForwardTraits<Element, Tiles, false>>(p, stream);
}

}  // namespace jax_flash::attention
