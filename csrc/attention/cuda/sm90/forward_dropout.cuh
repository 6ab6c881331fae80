// Dropout in the Hopper forward: a consumer draws 16 columns of P as soon as they are there, under
// the exponentials of the next ones, which leave more than half of the issue slots free. Registers
// of S become as many of packed P and of masks, and one AND makes the operand of O += P V of both.
// What it costs, and why: docs/kernels/hopper_forward.md.
#pragma once

#include "attention/cuda/dropout.cuh"
#include "attention/cuda/sm90/forward_traits.cuh"
#include "common/philox.h"
#include "device/element.cuh"

namespace jax_flash::attention::sm90 {

// Of a lane; everything is in registers.
template <typename Traits>
class ForwardDropout {
 public:
  static constexpr int kBlocks = Traits::kBlockN / 16;  // of 16 columns

  // Before the first draw of a job; `row` is the warp's first, from the sequence's start.
  __device__ __forceinline__ void begin(const Dropout& dropout, int row) {
    row_ = dropout.row_part(row);
    key0_ = dropout.key0();
    key1_ = dropout.key1();
    threshold_pair_ = dropout.threshold_pair();
  }

  // Packs the elements of P in columns 16 i to 16 i + 15, two accumulators side by side, and draws
  // which are kept. `columns` are the tile's (ForwardTraits::Smem).
  __device__ __forceinline__ void draw(int i, const PhiloxColumn* columns, const float (&left)[4],
                                       const float (&right)[4]) {
    const Philox4 words = philox(row_, columns[4 * i + threadIdx.x % 4], philox_keys(key0_, key1_));
    drawn_[i] = words.x;
    device::pack_operand<typename Traits::Element>(packed_[i], left, right);
    mask_[i][0] = dropout_pair_mask(words.x, threshold_pair_);
    mask_[i][1] = dropout_pair_mask(words.z, threshold_pair_);
    mask_[i][2] = dropout_pair_mask(words.y, threshold_pair_);
    mask_[i][3] = dropout_pair_mask(words.w, threshold_pair_);
  }

  // scale_log2 for the columns after 16 i + 15. NOTE: known only when some draw is done, as far as
  // ptxas can see, since otherwise it puts all exponentials before nearly all draws: then the
  // special function unit is idle while these are made (4% of the call; H200, head dim 128, full).
  // The last but one gap is skipped, so that the last draws end with the last exponentials.
  __device__ __forceinline__ float scale_after(int i, const ForwardArguments& a) const {
    if (i < 2 || i + 1 >= kBlocks) return a.scale_log2;
    const int draw = i + 3 >= kBlocks && kBlocks > 4 ? i - 1 : i - 2;
    return __uint_as_float(__float_as_uint(a.scale_log2) ^ (drawn_[draw] & a.zero));
  }

  // P of the k-th 16 columns, dropped, as operand A.
  __device__ __forceinline__ void pack(int k, uint32_t (&rP)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) rP[j] = packed_[k][j] & mask_[k][j];
  }

 private:
  PhiloxRow row_;
  uint32_t key0_, key1_, threshold_pair_;
  uint32_t drawn_[kBlocks];  // a word of each draw
  uint32_t packed_[kBlocks][4], mask_[kBlocks][4];
};

}  // namespace jax_flash::attention::sm90
