// What a partial tile does that a full one does not: -inf in the scores of hidden elements.
#pragma once

#include "attention/cpu/isa/pack.h"
#include "attention/cpu/mask.h"

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {

// scores [keys][stride], one lane a query, for keys [range.begin, range.end) and `vecs` vectors of
// lanes from `lane` on.
inline void mask_scores(const QueryTile& tile, int lane, int64_t vecs, KeyRange range,
                        float* scores, int64_t stride) {
  alignas(64) int32_t allowed[kMaxQueryTile];
  const Float hidden = splat(-__builtin_inff());
  int64_t j = range.begin;
  while (j < range.end) {
    // Up to where the answer of the block mask holds, if there is one.
    const bool has_blocks = tile.blocks != nullptr;
    const int64_t stop = has_blocks ? least(range.end, allowed_lanes(tile, j, allowed)) : range.end;
    for (; j < stop; ++j, scores += stride) {
      const int32_t key = static_cast<int32_t>(j);
      for (int64_t v = 0; v < vecs; ++v) {
        const int64_t at = lane + v * kLanes;
        Int is_seen = (load<Int>(tile.first + at) <= key) & (load<Int>(tile.end + at) > key);
        if (has_blocks) is_seen &= load<Int>(allowed + at);
        float* place = scores + v * kLanes;
        store(place, is_seen ? load<Float>(place) : hidden);
      }
    }
  }
}

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
