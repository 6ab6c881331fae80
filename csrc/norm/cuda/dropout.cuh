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

// Which of a thread's columns are kept, in two vectors of a unit's rows, as bits: one exchange
// between neighbours serves all of them. The pair of columns 2i and 2i + 1 of vector v and row r
// has bits 15 - k and 31 - k, k = 4 v + 2 r + i % 2, of `low_` (i < 2) or `high_`.
class Kept {
 public:
  // All lanes of the warp together. Vectors are 256 columns apart.
  template <int kRows>
  __device__ __forceinline__ void draw(const Problem& p, const DropoutKey& key, uint32_t head,
                                       const uint32_t (&id)[kRows], int column) {
    const bool right = column / 8 & 1;
    const uint32_t threshold = p.dropout_threshold | p.dropout_threshold << 16;
    uint32_t halves[2] = {};  // of the block of 16 columns: left, right
    if (kRows == 2 && (id[0] ^ id[kRows - 1]) == 8) {
#pragma unroll
      for (int k = 0; k < 8; k += 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Philox4 c = call(key, head, id[0], column + 64 * k, 2 * right + i);
          add(halves[0], c.x, threshold, k + i);
          add(halves[1], c.y, threshold, k + i);
          add(halves[0], c.z, threshold, k + 2 + i);
          add(halves[1], c.w, threshold, k + 2 + i);
        }
      }
      if (id[0] & 8) {  // the lower row is the first
#pragma unroll
        for (uint32_t& half : halves) half = half >> 2 & 0x33333333u | half << 2 & 0xccccccccu;
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < 8; ++k) {
        if (kRows == 1 && (k & 2)) continue;
        const uint32_t own_id = k & 2 ? id[kRows - 1] : id[0];
        const Philox4 c = call(key, head, own_id, column + 64 * (k & 4), 2 * right + k % 2);
        add(halves[0], own_id & 8 ? c.z : c.x, threshold, k);
        add(halves[1], own_id & 8 ? c.w : c.y, threshold, k);
      }
    }
    const uint32_t own = right ? halves[1] : halves[0], other = right ? halves[0] : halves[1];
    const uint32_t given = __shfl_xor_sync(kWarp, other, 1);
    low_ = right ? given : own;
    high_ = right ? own : given;
  }

  // Zeroes what is dropped of 8 columns as they go to memory, or come from there.
  template <typename Chunks>
  __device__ __forceinline__ void drop(Chunks& chunks, int v, int r = 0) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t signs = (i < 2 ? low_ : high_) << (4 * v + 2 * r + i % 2);
      if constexpr (sizeof(chunks) == 16) {
        word(chunks[0], i) &= ptx::permute_bytes<0xbb99>(signs, 0);
      } else {
        word(chunks[i / 2], 2 * i % 4) &= ptx::permute_bytes<0x9999>(signs, 0);
        word(chunks[i / 2], 2 * i % 4 + 1) &= ptx::permute_bytes<0xbbbb>(signs, 0);
      }
    }
  }
  // What was the second row is the first.
  __device__ __forceinline__ void next_row() {
    low_ <<= 2;
    high_ <<= 2;
  }

 private:
  static constexpr uint32_t kSigns = 0x80008000u;

  __device__ __forceinline__ static uint32_t& word(uint4& chunk, int i) {
    return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
  }
  __device__ __forceinline__ static Philox4 call(const DropoutKey& key, uint32_t head, uint32_t id,
                                                 uint32_t column, uint32_t q) {
    return philox({column / 16u * 4 + q, id / 16 * 8 + id % 8, head, key.batch}, key.key0,
                  key.key1);
  }
  // A draw is kept if the difference to the threshold borrows nothing.
  __device__ __forceinline__ static void add(uint32_t& half, uint32_t draws, uint32_t threshold,
                                             int k) {
    const uint32_t difference = __vsub2(draws, threshold);
    const uint32_t kept = (draws & ~threshold) | ((draws | ~threshold) & ~difference);
    half |= (kept & kSigns) >> k;
  }

  uint32_t low_ = 0, high_ = 0;
};

}  // namespace jax_flash::norm
