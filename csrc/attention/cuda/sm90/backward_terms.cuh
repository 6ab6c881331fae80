// -lse / scale and -delta of every query as terms of S^T and dP^T, so that P = 2^(scale_log2 S) and
// dS = P * dP. The tensor cores add them: lanes that each load lse and delta take a wavefront of
// shared memory a register, 256 of 3200 in a step at H = 128, 512 of 3300 at H = 64.
//
// A term is a sum of kTermParts 16-bit parts times constant weights, as exact as float32. The parts
// are an operand B of eight rows, which counts twice: rows 0 to 3 are those of -lse / scale, rows 4
// to 7 those of -delta where dP has terms and else zero. Operand A has half of the weights in four
// of eight columns and zeros elsewhere, the same for all keys: a block of eight keys, which counts
// 16 times. (No part is infinite or NaN.)
//
// In global memory a query tile has kTermRows rows of each 64 queries, swizzled as in shared memory
// but without the rows of zeros; then, where delta is no term, delta in the order of stats_index.
#pragma once

#include <type_traits>

#include "attention/cuda/sm90/backward_arguments.h"
#include "device/element.cuh"
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"

namespace jax_flash::attention::sm90 {

inline constexpr int kTermParts = 4;
template <int kQueries>
using TermTile = device::SharedTile<8, kQueries>;
// Rows 0 to 7 are operand A of the terms of S, rows 4 to 11 that of the terms of dP.
struct Weights {
  uint4 rows[12];  // of eight keys
};

// bfloat16 has float32's range and 8 of its 24 bits. float16 has 11 bits down to 2^-14 and ends at
// 2^-24: of a term up to 2^31 these weights leave less than 2^-38 or 2^-36 of the term, and no part
// is out of range.
template <typename Element>
__device__ constexpr float term_weight(int part) {
  if constexpr (std::is_same_v<Element, __half>) {
    return part == 0 ? 0x1p15f : part == 1 ? 0x1p5f : part == 2 ? 0x1p-5f : 0x1p-14f;
  } else {
    return part < 3 ? 1.0f : 0.0f;
  }
}
template <typename Element>
inline constexpr float kMaxTerm = std::is_same_v<Element, __half> ? 65504.0f * 0x1p15f : 3e38f;
// The largest of a type, or nearly.
template <typename Element>
inline constexpr float kLargest = std::is_same_v<Element, __half> ? 65504.0f : 3e38f;
// With a smaller scale -lse / scale of scores near zero could pass kMaxTerm; in float16, scores
// (unscaled) beyond 2^31 do, which is beyond 2^15 scaled.
template <typename Element>
inline constexpr float kMinTermScale = std::is_same_v<Element, __half> ? 0x1p-16f : 0x1p-100f;

// Part `part` of a term: what is left after the parts before it, rounded.
template <typename Element>
__device__ __forceinline__ Element term_part(float x, int part) {
  x = fminf(fmaxf(x, -kMaxTerm<Element>), kMaxTerm<Element>);
  Element result = {};
#pragma unroll
  for (int i = 0; i < kTermParts; ++i) {
    const float weight = term_weight<Element>(i);
    if (i > part) break;
    result = weight == 0.0f ? Element{} : static_cast<Element>(x / weight);
    x -= static_cast<float>(result) * weight;
  }
  return result;
}

// Writes the rows of a query tile, from -lse / scale and -delta of its queries (terms[1] is not
// read where delta is no term). One part of eight queries a thread.
template <typename Element, int kTermRows, int kQueries>
__device__ __forceinline__ void write_terms(void* stats, const float (&terms)[2][kQueries]) {
  if (threadIdx.x >= kQueries / 8 * kTermRows) return;
  const int chunk = threadIdx.x / kTermRows, row = threadIdx.x % kTermRows;
  const float* const queries = &terms[row / kTermParts][8 * chunk];
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Element pair[2] = {term_part<Element>(queries[2 * i], row % kTermParts),
                             term_part<Element>(queries[2 * i + 1], row % kTermParts)};
    words[i] = device::pack_elements(pair[0], pair[1]);
  }
  const int offset = (chunk / 8 * kTermRows + row) * 8 + (chunk % 8 ^ row);
  static_cast<uint4*>(stats)[offset] = {words[0], words[1], words[2], words[3]};
}

// Copies a query tile's rows.
template <int kTermRows, typename Tile>
__device__ __forceinline__ void load_terms(Tile& tile, const void* stats, ptx::Mbarrier& barrier) {
  constexpr int kBytes = kTermRows * Tile::kRowBytes;
#pragma unroll
  for (int slab = 0; slab < Tile::kSlabs; ++slab) {
    ptx::bulk_load(reinterpret_cast<char*>(tile.data) + slab * Tile::kSlabBytes,
                   static_cast<const char*>(stats) + slab * kBytes, kBytes, barrier);
  }
}

// The rows of zeros, which never change. All threads; a fence for the asynchronous proxy and a
// barrier must follow.
template <int kTermRows, typename Tile>
__device__ __forceinline__ void zero_other_rows(Tile& tile) {
  constexpr int kUsed = kTermRows * Tile::kChunks, kZero = 8 * Tile::kChunks - kUsed;
  if constexpr (kZero > 0) {
    for (int i = threadIdx.x; i < Tile::kSlabs * kZero; i += blockDim.x) {
      uint4* const slab = reinterpret_cast<uint4*>(tile.data) + i / kZero * (8 * Tile::kChunks);
      slab[kUsed + i % kZero] = uint4{};
    }
  }
}

// Halves of the weights in rows 0 to 3 and 8 to 11, zeros between them.
template <typename Element>
__device__ __forceinline__ void fill_weights(Weights& weights) {
  if (threadIdx.x >= 3 * kTermParts) return;
  float weight = 0.0f;
#pragma unroll
  for (int i = 0; i < kTermParts; ++i) {
    if (threadIdx.x % (2 * kTermParts) == i) weight = term_weight<Element>(i) / 2;
  }
  const uint32_t pair = device::pack<Element>(weight, weight);
  weights.rows[threadIdx.x] = {pair, pair, pair, pair};
}

}  // namespace jax_flash::attention::sm90
