// How many threads share a row's heads, and how many rows a block takes.
#pragma once

#include <algorithm>

#include "device/places.cuh"
#include "rotary/params.h"

namespace jax_flash::rotary {

inline constexpr int kMostThreads = 256;

// Heads that a thread turns at once: four chunks of 16 bytes, where those are aligned.
template <bool kInterleaved, bool kAligned>
inline constexpr int kHeadsAtOnce = kInterleaved || !kAligned ? 4 : 2;

struct Plan {
  int64_t rows;             // of all batch entries
  device::Places places;    // of rows
  device::Divisor by_row;   // threads that share a row
  device::Divisor by_head;  // threads that share a head, each with some of its pairs
  int heads_at_once;        // of a row, by different threads
  int rows_of_block;
};

// `units`: of a head, what a thread turns at once; `unroll`: heads that it turns at once.
inline Plan make_plan(const Params& p, int units, int unroll) {
  const int of_head = std::min(units, kMostThreads);
  const int heads = std::min((p.heads + unroll - 1) / unroll, kMostThreads / of_head);
  return {
      .rows = p.batch_shape[0] * p.batch_shape[1] * p.batch_shape[2] * p.rows,
      .places = device::Places(p.batch_shape, p.rows),
      .by_row = device::Divisor(of_head * heads),
      .by_head = device::Divisor(of_head),
      .heads_at_once = heads,
      .rows_of_block = std::max(1, kMostThreads / (of_head * heads)),
  };
}

// Whether all that a thread touches lies on 16 bytes: chunks of `size` elements.
inline bool is_aligned(const Params& p, int size) {
  const auto on_16 = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const int in_a_chunk = p.is_interleaved ? 2 * p.pairs : p.pairs;
  bool aligned = p.head_dim % size == 0 && in_a_chunk % size == 0 && on_16(p.x) && on_16(p.out);
  for (const Table& table : p.tables) {
    aligned = aligned && on_16(table.cos.data) && on_16(table.sin.data);
  }
  return aligned;
}

}  // namespace jax_flash::rotary
