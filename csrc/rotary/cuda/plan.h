// Which blocks and threads take which part of a row.
#pragma once

#include <algorithm>

#include "device/places.cuh"
#include "rotary/params.h"

namespace jax_flash::rotary {

inline constexpr int kMostThreads = 128;  // of a block

// The one stride of all three batch axes counted through, or -1.
inline int64_t one_stride(const int64_t (&batch_shape)[kBatchDims], const BatchStrides& strides) {
  int64_t size = 1, found = -1;
  for (int axis = kBatchDims; axis-- > 0; size *= batch_shape[axis]) {
    if (batch_shape[axis] == 1) continue;
    if (found < 0) found = strides.stride[axis];
    if (strides.stride[axis] != found * size) return -1;
  }
  return std::max<int64_t>(found, 0);
}

// From a batch entry to the next, where that is one number an array: most calls share the tables,
// and have the positions in common or of every entry.
struct Strides {
  bool are_known;
  int64_t positions, tables[2];

  explicit Strides(const Params& p) : positions(one_stride(p.batch_shape, p.positions.batch)) {
    are_known = positions >= 0;
    for (int i = 0; i < 2; ++i) {
      const Table& table = p.heads[i].table;
      tables[i] = one_stride(p.batch_shape, table.cos.batch);
      const int64_t sines = one_stride(p.batch_shape, table.sin.batch);
      are_known = are_known && tables[i] >= 0 && sines == tables[i];
    }
  }
};

// The blocks of one kind of heads. A unit is what a thread does: a place in a head, of a few heads.
struct Share {
  device::Divisor by_parts;  // blocks that share a row
  device::Divisor by_row;    // units of a row
  int rows_of_block = 1;     // 1 where blocks share a row
  uint32_t blocks = 0;

  Share() = default;
  Share(int64_t rows, int64_t of_row) : by_row(of_row) {
    const int64_t parts = (of_row + kMostThreads - 1) / kMostThreads;
    by_parts = device::Divisor(parts);
    rows_of_block = static_cast<int>(std::max<int64_t>(1, kMostThreads / of_row));
    blocks = static_cast<uint32_t>((rows + rows_of_block - 1) / rows_of_block * parts);
  }
};

struct Plan {
  int64_t rows;  // of all batch entries
  Strides strides;
  device::Divisor by_rows;  // of a batch entry, where strides are known
  device::Places places;    // of rows, where not
  device::Divisor by_head;  // units of a head: first those that turn, then those that copy
  int turning;              // of by_head
  int threads;              // of a block
  Share shares[2];

  template <typename Pairs>
  static Plan make(const Params& p) {
    const bool in_place = p.heads[0].x == p.heads[0].out;
    const int64_t rest = in_place ? 0 : p.head_dim - 2 * p.pairs;
    const int turning = p.pairs / Pairs::kCount;
    const int64_t of_head = turning + rest / Pairs::kCopied;
    const int64_t rows = p.batch_shape[0] * p.batch_shape[1] * p.batch_shape[2] * p.rows;
    Plan plan{
        .rows = rows,
        .strides = Strides(p),
        .places = device::Places(p.batch_shape, p.rows),
        .by_head = device::Divisor(of_head),
        .turning = turning,
        .threads = 0,
    };
    plan.strides.are_known = plan.strides.are_known && rows <= INT32_MAX;
    if (plan.strides.are_known) plan.by_rows = device::Divisor(p.rows);
    for (int kind = 0; kind < p.kinds; ++kind) {
      const int64_t of_row = of_head * ((p.heads[kind].count + Pairs::kHeads - 1) / Pairs::kHeads);
      plan.shares[kind] = Share(rows, of_row);
      const int64_t parts = plan.shares[kind].by_parts.value;
      const int64_t used =
          parts > 1 ? (of_row + parts - 1) / parts : of_row * plan.shares[kind].rows_of_block;
      plan.threads = std::max(plan.threads, static_cast<int>((used + 31) / 32 * 32));
    }
    return plan;
  }
};

// Whether all that a thread touches lies on 16 bytes.
template <typename Pairs>
bool is_aligned(const Params& p) {
  const auto on_16 = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  bool aligned = p.head_dim % Pairs::kCopied == 0 && p.pairs % Pairs::kCount == 0;
  for (int kind = 0; kind < p.kinds; ++kind) {
    const Heads& heads = p.heads[kind];
    aligned = aligned && on_16(heads.x) && on_16(heads.out);
    aligned = aligned && on_16(heads.table.cos.data) && on_16(heads.table.sin.data);
  }
  return aligned;
}

}  // namespace jax_flash::rotary
