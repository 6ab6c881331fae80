// The random draws of a thread's 8 columns in the rows of a unit.
//
// One Philox call serves columns 2q, 2q + 1 and 2q + 8, 2q + 9 of a block of 16 in rows r and r + 8
// (common/philox.h). Even lanes hold the left half of such a block, odd lanes the right: each makes
// two of the four calls and gives its neighbour what the other half needs, so that with pairs of
// rows no draw is made twice.
#pragma once

#include "common/philox.h"
#include "norm/cuda/team.cuh"

namespace jax_flash::norm {

inline constexpr uint32_t kDropoutHead = 0x4E4F524Du;  // "NORM"; the second branch has the next

struct DropoutKey {
  uint32_t key0 = 0, key1 = 0, batch = 0;

  DropoutKey() = default;
  __device__ DropoutKey(const Problem& p, int64_t entry) {
    const uint32_t* state = p.dropout_state.data + entry * p.dropout_state.entry_stride;
    key0 = device::uniform(state[0]);
    key1 = device::uniform(state[1]);
    batch = device::uniform(state[2]);
  }
};

class Draws {
 public:
  // For the row with number `id`; `again`: the calls of the row before serve this one, too. All
  // lanes of the warp together.
  __device__ __forceinline__ void draw(const DropoutKey& key, uint32_t head, uint32_t id,
                                       bool again, int column) {
    const uint32_t right = column / 8 & 1;
    if (!again) {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t q = 2 * right + i;
        calls_[i] = philox({column / 16u * 4 + q, id / 16 * 8 + id % 8, head, key.batch}, key.key0,
                           key.key1);
      }
    }
    const bool lower = (id & 8) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t left_word = lower ? calls_[i].z : calls_[i].x;
      const uint32_t right_word = lower ? calls_[i].w : calls_[i].y;
      const uint32_t own = right ? right_word : left_word;
      const uint32_t other = __shfl_xor_sync(kWarp, right ? left_word : right_word, 1);
      words_[i] = right ? other : own;
      words_[i + 2] = right ? own : other;
    }
  }

  __device__ __forceinline__ bool keeps(const Problem& p, int i) const {
    return (i % 2 == 0 ? words_[i / 2] << 16 : words_[i / 2]) >= p.dropout_threshold << 16;
  }

  // keeps of all columns, as bits.
  __device__ __forceinline__ uint32_t kept(const Problem& p) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCols; ++i) bits |= keeps(p, i) ? 1u << i : 0;
    return bits;
  }

 private:
  Philox4 calls_[2];
  uint32_t words_[4];  // of columns 2i (low half) and 2i + 1
};

}  // namespace jax_flash::norm
