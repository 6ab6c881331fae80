// The element mask of a partial tile of S^T: rows are keys, columns queries.
#pragma once

#include <cmath>

#include "attention/cuda/blocks.cuh"

namespace jax_flash::attention::sm90 {

// Sets the forbidden elements to -inf. rS[n][e] of lane l is the score of key j + l / 4 + 8 (e / 2)
// and query i + 8 n + 2 (l % 4) + e % 2, both counted from the sequence's start and multiples of
// 16. Queries past query_length keep what they have: their lse makes P zero.
template <int kN>
__device__ __forceinline__ void mask_scores(float (&rS)[kN][4], const Sequence& s, int j, int i) {
  const int lane = threadIdx.x % 32, first = i + 2 * (lane % 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = j + 8 * half + lane / 4;
    // Queries that see the key, relative to this lane's first.
    const int low = key < s.key_length ? key - s.right - first : INT32_MAX;
    const int high = key - s.left - first;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * n + e < low || 8 * n + e > high) rS[n][2 * half + e] = -INFINITY;
      }
    }
  }
}
template <int kN>
__device__ __forceinline__ void mask_scores(float (&rS)[kN][4], const Sequence& s,
                                            const BlockMask& blocks, int j, int i) {
  mask_scores(rS, s, j, i);
  if (blocks.data != nullptr && j < s.key_length) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      const int row = min(i + 8 * n, s.query_length - 1);  // past the end: any that exists
      if (!blocks.allows(row, j)) {
#pragma unroll
        for (int e = 0; e < 4; ++e) rS[n][e] = rS[n + 1][e] = -INFINITY;
      }
    }
  }
}

}  // namespace jax_flash::attention::sm90
