// The dropout bits of common/philox.h, drawn for a whole tile of (key, query) at once.
#pragma once

#include "attention/cpu/isa/pack.h"
#include "attention/cpu/mask.h"
#include "common/philox.h"

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {

struct DropoutState {
  uint32_t threshold = 0;
  uint32_t key0 = 0, key1 = 0, batch = 0, head = 0;

  // The kept elements are scaled by this.
  float keep_scale() const { return 65536.0f / static_cast<float>(65536 - threshold); }
};

inline DropoutState dropout_of(const Problem& p, const Sequence& sequence, int64_t head) {
  DropoutState state;
  if (p.dropout.threshold == 0) return state;
  const uint32_t* words = p.dropout.state.data;
  for (int axis = 0; axis < kBatchDims; ++axis) {
    words += sequence.batch[axis] * p.dropout.state.batch.stride[axis];
  }
  state.threshold = p.dropout.threshold;
  state.key0 = words[0];
  state.key1 = words[1];
  state.batch =
      words[2] * static_cast<uint32_t>(p.num_sequences) + static_cast<uint32_t>(sequence.index);
  state.head = p.dropout.head_ids[head];
  return state;
}

// Philox on kLanes / 2 counters at once, a 32-bit word in each 64-bit lane (the high halves hold
// rubbish that no operation lets down).
JAX_FLASH_INLINE void philox_lanes(Wide& x, Wide& y, Wide& z, Wide& w, uint32_t key0,
                                   uint32_t key1) {
  const Wide m0 = Wide{} + kPhiloxM0, m1 = Wide{} + kPhiloxM1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Wide p0 = multiply_low(m0, x), p1 = multiply_low(m1, z);
    x = (p1 >> 32) ^ y ^ key0;
    y = p1;
    z = (p0 >> 32) ^ w ^ key1;
    w = p0;
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
}

// draws [keys / 2][lanes]: the low half of a word is the draw of the even key, the high half of the
// odd one. first_key, first_query and lanes are multiples of 16; keys is rounded up to it.
inline void draw_tile(const DropoutState& state, int64_t first_key, int64_t keys,
                      int64_t first_query, int64_t lanes, uint32_t* draws) {
  constexpr int kCounters = kLanes / 2;
  Wide lane_ids;
  for (int i = 0; i < kCounters; ++i) lane_ids[i] = i;
  // One call serves rows r, r + 8 and columns 2q, 2q + 1, 2q + 8, 2q + 9 of a 16 x 16 block.
  for (int64_t key_block = 0; key_block < (keys + 15) / 16; ++key_block) {
    for (int q = 0; q < 4; ++q) {
      uint32_t* near = draws + (key_block * 8 + q) * lanes;  // columns 2q, 2q + 1
      uint32_t* far = near + 4 * lanes;                      // columns 2q + 8, 2q + 9
      const uint32_t column = static_cast<uint32_t>(first_key / 16 + key_block) * 4 + q;
      for (int64_t row = 0; row < lanes; row += 16) {
        for (int r = 0; r < 8; r += kCounters) {
          Wide x = Wide{} + column;
          Wide y = lane_ids + static_cast<uint64_t>((first_query + row) / 16 * 8 + r);
          Wide z = Wide{} + state.head;
          Wide w = Wide{} + state.batch;
          philox_lanes(x, y, z, w, state.key0, state.key1);
          store(near + row + r, __builtin_convertvector(x, Narrow));
          store(far + row + r, __builtin_convertvector(y, Narrow));
          store(near + row + 8 + r, __builtin_convertvector(z, Narrow));
          store(far + row + 8 + r, __builtin_convertvector(w, Narrow));
        }
      }
    }
  }
}

// All ones where the lane's element is kept, for an even and the next odd key.
JAX_FLASH_INLINE Int kept_even(const uint32_t* draws, uint32_t threshold) {
  return (load<Int>(draws) & 0xffff) >= static_cast<int32_t>(threshold);
}
JAX_FLASH_INLINE Int kept_odd(const uint32_t* draws, uint32_t threshold) {
  return ((load<Int>(draws) >> 16) & 0xffff) >= static_cast<int32_t>(threshold);
}

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
