// The backward of rows that fill blocks: a row is `by_parts` blocks, a thread has two vectors of it
// and is done. A warp's vectors follow each other, and blocks that start one after the other go
// through memory one after the other: loops over a row by 512 or 1024 threads, each load of them 8
// or 16 KiB from the last, were 1 to 6% slower (docs/kernels/cross_entropy.md).
#pragma once

#include "cross_entropy/cuda/backward.cuh"
#include "device/places.cuh"

namespace jax_flash::cross_entropy {

inline constexpr int kPartThreads = 128, kPartVectors = 2;  // of a thread

// Blocks that share a row of this width: enough for its vectors, wherever the first one is.
template <int kSize>
int64_t parts_of_row(int64_t vocabulary) {
  constexpr int kLine = 8 * kSize;  // elements of 128 bytes: see Columns
  const bool starts_on_lines = vocabulary % kLine == 0;
  const int64_t columns = vocabulary + (starts_on_lines ? 0 : kLine - 1);
  const int64_t of_part = int64_t{kPartThreads} * kPartVectors * kSize;
  return (columns + of_part - 1) / of_part;
}

// kEager: vectors are loaded before it is known whether the row has dlse. Where few blocks share a
// row, dlse comes from L2 and is worth no waiting; else L1 has it, and a row without is not read.
template <typename Element, typename Result, bool kEager>
__global__ void __launch_bounds__(kPartThreads, 2048 / kPartThreads)
    backward_parts_kernel(const __grid_constant__ BackwardParams p,
                          const __grid_constant__ device::Divisor by_parts) {
  constexpr int kSize = 16 / sizeof(Element);
  using ResultVector = device::Vector<Result, kSize>;

  uint32_t part;
  const int64_t row = by_parts.divide(blockIdx.x, part);
  const int64_t first = row * p.vocabulary;
  const Element* logits = static_cast<const Element*>(p.logits) + first;
  Result* dlogits = static_cast<Result*>(p.dlogits) + first_result_row(p) * p.vocabulary + first;
  const Columns<kSize> columns(first, p.vocabulary);
  const int thread = threadIdx.x, lane = thread % 32;
  const int vector = (part * kPartThreads + thread - lane) * kPartVectors + lane;

  const uint4* source = reinterpret_cast<const uint4*>(logits + columns.origin) + vector;
  uint4 words[kPartVectors];
  const auto load = [&] {
#pragma unroll
    for (int u = 0; u < kPartVectors; ++u) {
      if (columns.has(vector + 32 * u)) words[u] = source[32 * u];
    }
  };
  if (kEager) load();
  const float lse = p.lse[row];
  const Cotangents d = cotangents_of(p, row, lse);
  const Gradient gradient(p, d, lse);
  if (!kEager && gradient.reads) load();
  const int32_t label = p.labels[row];  // of no column where it is no class
  const float of_label = p.scale * d.dlabel;

  const auto put_one = [&](int column) {
    if (column < 0) return;
    const float others = gradient(gradient.reads ? device::to_float(logits[column]) : 0.0f);
    dlogits[column] = device::from_float<Result>(column == label ? of_label + others : others);
  };
  if (part == 0) put_one(columns.head_column(thread));
  if (part == by_parts.value - 1) put_one(columns.tail_column(thread));

  ResultVector* target = reinterpret_cast<ResultVector*>(dlogits + columns.origin) + vector;
#pragma unroll
  for (int u = 0; u < kPartVectors; ++u) {
    if (!columns.has(vector + 32 * u)) continue;
    float x[kSize];
    to_floats<Element>(words[u], x);
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = gradient(x[j]);
    const uint32_t place = static_cast<uint32_t>(label) - columns.column(vector + 32 * u);
    if (place < kSize) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] += j == place ? of_label : 0.0f;
    }
    ResultVector out;
#pragma unroll
    for (int j = 0; j < kSize; ++j) out.at[j] = device::from_float<Result>(x[j]);
    target[32 * u] = out;
  }
}

}  // namespace jax_flash::cross_entropy
