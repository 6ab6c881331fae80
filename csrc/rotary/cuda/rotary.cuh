// Turns the heads of rows: a thread keeps its pairs' cosines and sines for all heads that it turns
// of a row, and reads what it writes and nothing else, so that the result may take x's memory.
// docs/kernels/rotary.md has the figures.
#pragma once

#include "device/places.cuh"
#include "rotary/cuda/pairs.cuh"
#include "rotary/cuda/plan.h"

namespace jax_flash::rotary {

// Cosines and sines of one row's pairs [j, j + kCount).
template <int kCount>
struct Angles {
  static constexpr int kSize = kCount < 4 ? kCount : 4;
  float cos[kCount], sin[kCount];

  __device__ __forceinline__ void load(const Table& table, const device::BatchIndex& batch,
                                       int64_t offset, float sign) {
    using Vector = device::Vector<float, kSize>;
#pragma unroll
    for (int i = 0; i < kCount; i += kSize) {
      const Vector c = Vector::load(batch.of(table.cos) + offset + i);
      const Vector s = Vector::load(batch.of(table.sin) + offset + i);
#pragma unroll
      for (int k = 0; k < kSize; ++k) cos[i + k] = c.at[k], sin[i + k] = sign * s.at[k];
    }
  }
};

template <typename Pairs, int kCount>
__device__ __forceinline__ void turn(Pairs& pairs, const Angles<kCount>& angles) {
  float x1[kCount], x2[kCount], out1[kCount], out2[kCount];
  pairs.widen(x1, x2);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    out1[i] = x1[i] * angles.cos[i] - x2[i] * angles.sin[i];
    out2[i] = x1[i] * angles.sin[i] + x2[i] * angles.cos[i];
  }
  pairs.narrow(out1, out2);
}

template <typename Element, bool kInterleaved, bool kAligned>
__global__ void __launch_bounds__(kMostThreads)
    rotary_kernel(const __grid_constant__ Params p, const __grid_constant__ Plan plan) {
  using Pairs = Pairs<Element, kInterleaved, kAligned>;
  constexpr int kCount = Pairs::kCount, kUnroll = kHeadsAtOnce<kInterleaved, kAligned>;

  // The block's rows, and of a row the thread's pairs and heads.
  uint32_t thread, unit;
  const int row_in_block = plan.by_row.divide(threadIdx.x, thread);
  const int first_head = plan.by_head.divide(thread, unit);
  const int64_t flat = int64_t{blockIdx.x} * plan.rows_of_block + row_in_block;
  if (flat >= plan.rows) return;

  const int kind = blockIdx.y, head_dim = p.head_dim;
  const int64_t row_size = int64_t{p.kinds == 1 ? 1 : 3} * p.heads * head_dim;
  const int64_t begin = flat * row_size + int64_t{kind} * p.heads * head_dim;
  const Element* x = static_cast<const Element*>(p.x) + begin;
  Element* out = static_cast<Element*>(p.out) + begin;

  const float sign = p.is_conjugate ? -1.0f : 1.0f;
  const int step = plan.by_head.value * kCount;
  for (int j = unit * kCount; j < p.pairs; j += step) {
    Pairs pairs[kUnroll];
    const auto load = [&](int head) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int h = head + u * plan.heads_at_once;
        if (h < p.heads) pairs[u].load(x + h * head_dim, j, p.pairs);
      }
    };
    load(first_head);  // before the position is waited for
    const device::Place place = plan.places.of(flat);
    const int32_t position = place.batch.of(p.positions)[place.row];
    Angles<kCount> angles;
    if (position >= 0 && position < p.length) {
      angles.load(p.tables[kind], place.batch, position * int64_t{p.pairs} + j, sign);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) angles.cos[i] = angles.sin[i] = NAN;
    }
    for (int head = first_head; head < p.heads;) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int h = head + u * plan.heads_at_once;
        if (h >= p.heads) break;
        if (position >= 0) turn(pairs[u], angles);
        pairs[u].store(out + h * head_dim, j, p.pairs);
      }
      head += kUnroll * plan.heads_at_once;
      load(head);
    }
  }

  // Copy what is not turned, unless it is there.
  const int rest = head_dim - 2 * p.pairs;
  if (rest == 0 || p.x == p.out) return;
  for (int i = thread; i < rest * p.heads; i += plan.by_row.value) {
    const int at = i / rest * head_dim + 2 * p.pairs + i % rest;
    out[at] = x[at];
  }
}

}  // namespace jax_flash::rotary
