// How many threads share a row's heads, and how many rows a block takes.
#pragma once

#include <algorithm>

#include "rotary/params.h"

namespace jax_flash::rotary {

inline constexpr int kMostThreads = 256;

struct Plan {
  int threads_of_head;  // each turns some pairs
  int heads_at_once;    // of a row
  int threads_of_row, rows_of_block;
};

// `units`: of a head, what a thread turns at once; `unroll`: heads that it turns at once.
inline Plan make_plan(const Params& p, int units, int unroll) {
  Plan plan;
  plan.threads_of_head = std::min(units, kMostThreads);
  const int most = kMostThreads / plan.threads_of_head;
  plan.heads_at_once = std::min((p.heads + unroll - 1) / unroll, most);
  plan.threads_of_row = plan.threads_of_head * plan.heads_at_once;
  plan.rows_of_block = std::max(1, kMostThreads / plan.threads_of_row);
  return plan;
}

// Whether all that a thread touches lies on 16 bytes: chunks of `size` elements.
inline bool is_aligned(const Params& p, int size) {
  const auto on = [](const void* data, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
  };
  const int of_half = p.is_interleaved ? 2 * p.pairs : p.pairs;
  bool aligned = p.head_dim % size == 0 && of_half % size == 0 && on(p.x, 16) && on(p.out, 16);
  for (const Table& table : p.tables) {
    aligned = aligned && on(table.cos.data, 16) && on(table.sin.data, 16);
  }
  return aligned;
}

}  // namespace jax_flash::rotary
