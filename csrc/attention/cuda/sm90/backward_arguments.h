// What the launches of a Hopper backward share.
#pragma once

#include "attention/cuda/backward_plan.h"
#include "attention/cuda/blocks.cuh"
#include "attention/cuda/sm90/operand_map.h"

namespace jax_flash::attention::sm90 {

// What dropout's draws begin with (common/philox.h).
struct DropoutWords {
  uint32_t key0, key1, batch;
};

// What a CTA does at one go: for a key tile, `num_steps` of the (head of the group, query tile of
// the range), from (first_head, first_tile) on: all of them, or where key_splits CTAs share them, a
// part. Found by the prepare kernel, since the producer warp has no registers to look for it.
struct alignas(16) KeyTilePlace {
  Sequence sequence;
  BatchIndex batch;
  TileRange range;
  float* dkv_sum;  // of this tile and split; nullptr: dK and dV leave whole
  int query_tile;  // of head 0 and the sequence's first rows: [batches, heads, query_slots]
  int kv_head, first_head, first_tile, num_steps;
  // Where a CTA takes whole columns (backward_column.cuh). Of the range, the tiles that no key tile
  // before this one sees, and those that none after it does:
  int first_unseen, end_of_complete;
  int next;  // the number of the CTA's next place
  DropoutWords dropout;
  bool exists;  // or this is the end of the list
};

// A CTA has all key tiles of a column, in their order, and makes dQ as such: its sums need neither
// zeros nor another kernel.
template <class Traits>
inline constexpr bool kTakesColumns = false;

// In what order key tiles are added to dQ.
enum class DqOrder {
  kAny,           // to zeros
  kFirstClaimed,  // the first, whoever that is, begins the sum with a store
  kFixed,         // bit for bit repeatable: that of the list, so that whoever waits waits for tiles
                  // that others have taken; the first is a store
};

struct BackwardArguments {
  BackwardParams p;
  BackwardPlan plan;
  OperandMap q, k, v, dout;
  OperandMap dk, dv;  // of 16 rows; where a CTA takes whole columns
  // Key tiles are numbered by section, slot, column of the section: the slots of `section` columns
  // (batch entry, kv head) pass by together, the first slots, which a causal mask makes the
  // longest, first.
  int num_places = 0, section = 1;
  int workers = 0;                 // CTAs or pairs of them
  KeyTilePlace* places = nullptr;  // [num_places + 1]: [key tiles, key_splits], and the end
  int* next_tile = nullptr;        // how many tiles were taken beyond the first of each CTA or pair
  DqOrder dq_order = DqOrder::kAny;
  // [batches, heads, query_slots, 2], of each of two parts of a tile's dQ. kFirstClaimed: 0, 1 when
  // the first is on its way, 2 when it is there; kFixed: how many are there.
  int* dq_states = nullptr;
  float lse_factor = 0.0f;  // of lse, in base 2, in S before scale: -1 / (scale log2(e))
};

// Where -delta in 16 bits, for dropout, begins among a tile's stats, in bytes.
template <int kBlockM>
inline constexpr int kMinusDelta = 16 * kBlockM;

// Where lse or delta of a tile's row lies among the tile's: each lane of a quad finds those of its
// columns of 16 queries of S^T, 2q, 2q + 1, 2q + 8 and 2q + 9, in one 16-byte load.
__host__ __device__ constexpr int stats_index(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}

}  // namespace jax_flash::attention::sm90
