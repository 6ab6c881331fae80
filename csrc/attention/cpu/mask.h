// The one question a tile asks of the mask: skip, full or partial? Causal, window, lengths and
// block lists are all answers to it; only a partial tile then looks at single elements.
//
// NOTE: nothing here is inline: these functions are called from objects that are compiled for
// different instruction sets, and an inline copy made for AVX-512 could be the one that the linker
// keeps for every CPU.
#pragma once

#include "attention/cpu/sequences.h"
#include "attention/params.h"

namespace jax_flash::attention::cpu {

inline constexpr int kMaxQueryTile = 256;

enum class TileKind { kSkip, kPartial, kFull };

struct KeyRange {
  int64_t begin, end;
};

// Queries [begin, begin + rows / heads) of a sequence, one a vector lane; for the forward of few
// queries, those of `heads` query heads of one kv head after each other. Lanes past `rows` repeat
// the last query: they see what it sees and their results are dropped. A block mask goes with one
// head only.
struct QueryTile {
  const MaskParams* mask;
  const uint8_t* blocks;  // [num_block_rows, num_block_cols] of this batch entry and head, or null
  int64_t begin;
  int heads, rows, lanes;
  // Lane i sees keys first[i] <= j < end[i] (and whose block is on); within a head neither ever
  // decreases.
  alignas(64) int32_t first[kMaxQueryTile];
  alignas(64) int32_t end[kMaxQueryTile];
};

void make_query_tile(const Problem& p, const Sequence& sequence, int64_t head, int heads,
                     int64_t begin, int rows, int lanes, QueryTile& tile);

// The keys that lanes [lane_begin, lane_end) may see between them, by diagonal and length.
KeyRange visible_keys(const QueryTile& tile, int lane_begin, int lane_end);

TileKind ask(const QueryTile& tile, int lane_begin, int lane_end, KeyRange keys);

// With a block mask: allowed[i] = -1 where lane i's block at key j is on, else 0. Returns the end
// of that column of blocks, up to which the answer holds.
int64_t allowed_lanes(const QueryTile& tile, int64_t j, int32_t* allowed);

}  // namespace jax_flash::attention::cpu
