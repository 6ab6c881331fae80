// Turns the heads of rows: a thread has 32 bytes, some pairs of one or two neighbouring heads, or
// copies what is not turned of them. It reads what it writes and nothing else, so that the result
// may take x's memory. docs/kernels/rotary.md has the figures.
#pragma once

#include "device/places.cuh"
#include "rotary/cuda/pairs.cuh"
#include "rotary/cuda/plan.h"

namespace jax_flash::rotary {

// A row's position, and the tables that it counts in.
struct Row {
  int32_t position;
  const float *cos, *sin;
};

__device__ __forceinline__ Row find_row(const Params& p, const Plan& plan, int64_t flat, int kind) {
  const Table& table = p.heads[kind].table;
  if (plan.strides.are_known) {
    uint32_t row;
    const int64_t entry = plan.by_rows.divide(static_cast<uint32_t>(flat), row);
    const int64_t offset = entry * plan.strides.tables[kind];
    const int32_t* positions = p.positions.data;
    return {positions ? positions[entry * plan.strides.positions + row] : static_cast<int>(row),
            table.cos.data + offset, table.sin.data + offset};
  }
  const device::Place place = plan.places.of(flat);
  const auto row = static_cast<int32_t>(place.row);
  return {p.positions.data ? place.batch.of(p.positions)[row] : row, place.batch.of(table.cos),
          place.batch.of(table.sin)};
}

template <typename Pairs>
__global__ void __launch_bounds__(kMostThreads, Pairs::kBlocks)
    rotary_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  using Element = typename Pairs::Element;
  constexpr int kHeads = Pairs::kHeads;

  // The block's rows or its part of one, and the thread's heads and its place in them.
  const int kind = blockIdx.x >= plan.shares[0].blocks;
  const Share& share = plan.shares[kind];
  uint32_t part, of_row, unit;
  const uint32_t block = share.by_parts.divide(blockIdx.x - kind * plan.shares[0].blocks, part);
  const int in_block = share.by_row.divide(part * blockDim.x + threadIdx.x, of_row);
  const int64_t flat = int64_t{block} * share.rows_of_block + in_block;
  if (in_block >= share.rows_of_block || flat >= plan.rows) return;
  const int head = kHeads * plan.by_head.divide(of_row, unit);
  const Heads& heads = p.heads[kind];
  const int left = heads.count - head;
  const int64_t begin = flat * heads.row_size + head * p.head_dim;
  const Element* x = static_cast<const Element*>(heads.x) + begin;
  Element* out = static_cast<Element*>(heads.out) + begin;

  if (unit >= plan.turning) {
    const int at = 2 * p.pairs + (unit - plan.turning) * Pairs::kCopied;
    for (int h = 0; h < kHeads && h < left; ++h) {
      Pairs::copy(x + h * p.head_dim + at, out + h * p.head_dim + at);
    }
    return;
  }
  const int j = unit * Pairs::kCount;
  Pairs pairs[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {  // before the position is waited for
    if (h < left) pairs[h].load(x + h * p.head_dim, j, p.pairs);
  }
  const Row row = find_row(p, plan, flat, kind);
  if (row.position >= 0) {
    Angles<Pairs::kCount> angles;
    if (row.position < p.length) {
      const int64_t at = row.position * int64_t{p.pairs} + j;
      angles.load(row.cos + at, row.sin + at, p.is_conjugate ? -1.0f : 1.0f);
    } else {
      angles.fill(NAN);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) pairs[h].turn(angles);
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h < left) pairs[h].store(out + h * p.head_dim, j, p.pairs);
  }
}

}  // namespace jax_flash::rotary
