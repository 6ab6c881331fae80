// Dropout of a tile of P from the counter-based bits of common/philox.h: one Philox call serves the
// eight elements that a thread holds of a 16x16 block of the accumulator.
#pragma once

#include "attention/cuda/seqlen.cuh"
#include "common/philox.h"
#include "ptx/sm80.cuh"

namespace jax_flash::attention {

class Dropout {
 public:
  __device__ Dropout(const DropoutParams& p, int64_t num_sequences, const BatchIndex& batch,
                     const Sequence& s, int head)
      : threshold_high_(p.threshold << 16) {
    if (p.threshold == 0) return;  // the state may be absent
    const uint32_t* state = batch.of(p.state);
    key0_ = state[0];
    key1_ = state[1];
    batch_ = state[2] * static_cast<uint32_t>(num_sequences) + s.index;
    head_ = p.head_ids[head];
  }

  // The draws of the 16x16 block at (row, col), multiples of 16, of this lane: with g = lane / 4
  // and q = lane % 4, the words x, y, z, w hold (g, 2q), (g, 2q + 8), (g + 8, 2q), (g + 8, 2q + 8),
  // each with the column after it in its high half. That is the order of an mma operand A or of two
  // accumulators side by side.
  __device__ __forceinline__ Philox4 bits(int row, int col) const {
    const uint32_t lane = threadIdx.x % 32;
    return philox({col / 16u * 4 + lane % 4, row / 16u * 8 + lane / 4, head_, batch_}, key0_,
                  key1_);
  }
  // Of a draw word: is the even (odd) column kept?
  __device__ __forceinline__ bool keeps_even(uint32_t word) const {
    return word << 16 >= threshold_high_;
  }
  __device__ __forceinline__ bool keeps_odd(uint32_t word) const { return word >= threshold_high_; }
  // The parts of these calls (philox.h): what a lane's block row has in common, and what a column
  // of calls has, with `index` = column / 16 * 4 + lane % 4 of the lane that uses it.
  __device__ __forceinline__ PhiloxRow row_part(int row) const {
    return philox_row(row / 16u * 8 + threadIdx.x % 32 / 4, head_, key0_);
  }
  __device__ __forceinline__ PhiloxColumn column_part(uint32_t index) const {
    return philox_column(index, head_, batch_, key0_, key1_);
  }
  __device__ uint32_t key0() const { return key0_; }
  __device__ uint32_t key1() const { return key1_; }
  __device__ uint32_t threshold_pair() const { return threshold_high_ | threshold_high_ >> 16; }

  // Zeroes the dropped elements of the 16x16 block of P at (row, col), held as two accumulators
  // side by side.
  __device__ __forceinline__ void apply(float (&left)[4], float (&right)[4], int row,
                                        int col) const {
    const Philox4 words = bits(row, col);
    drop(left[0], left[1], words.x);
    drop(right[0], right[1], words.y);
    drop(left[2], left[3], words.z);
    drop(right[2], right[3], words.w);
  }
  __device__ __forceinline__ void drop(float& even, float& odd, uint32_t word) const {
    if (!keeps_even(word)) even = 0.0f;
    if (!keeps_odd(word)) odd = 0.0f;
  }
  // Of an arbitrary element, counted from the sequence's start.
  __device__ __forceinline__ bool keeps(int row, int col) const {
    return dropout_draw(philox(dropout_counter(row, col, head_, batch_), key0_, key1_), row, col) >=
           threshold_high_ >> 16;
  }

 private:
  uint32_t key0_ = 0, key1_ = 0, head_ = 0, batch_ = 0, threshold_high_;
};

// Which halves of a draw word keep their element, in bits 15 and 31 of the result (the others mean
// nothing): the differences of the halves (VIADD.16x2, one instruction from sm_90 on), where they
// borrowed nothing. Two instructions, for any threshold. `threshold_pair` has it in both halves.
__device__ __forceinline__ uint32_t dropout_pair_signs(uint32_t word, uint32_t threshold_pair) {
  const uint32_t difference = __vsub2(word, threshold_pair);
  return (word & ~threshold_pair) | ((word | ~threshold_pair) & ~difference);
}
// The same all over its half, so that one AND drops both elements of a packed pair. Three
// instructions; VIMNMX.U16x2 with its two predicates would be one, but ptxas (13.0) leaves dead
// PRMTs beside it.
__device__ __forceinline__ uint32_t dropout_pair_mask(uint32_t word, uint32_t threshold_pair) {
  return ptx::permute_bytes<0xbb99>(dropout_pair_signs(word, threshold_pair), 0);
}

// What the kept elements are multiplied by.
__host__ __device__ inline float dropout_scale(const DropoutParams& p) {
  return 65536.0f / static_cast<float>(65536 - p.threshold);
}

}  // namespace jax_flash::attention
