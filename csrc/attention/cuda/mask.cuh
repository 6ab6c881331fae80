// The element mask of a partial tile, on the fragment that mma leaves: rows are queries, columns
// keys.
#pragma once

#include <cmath>

#include "attention/cuda/blocks.cuh"

namespace jax_flash::attention {

// Sets the forbidden elements of S to -inf. rS[m][n][e] of lane l is element (row + 16 m + l / 4 +
// 8 (e / 2), col + 8 n + 2 (l % 4) + e % 2); `row` and `col` count from the sequence's start and
// are those of the warp's block, multiples of 16 and of 8. Rows past query_length keep what they
// have.
template <int kM, int kN>
__device__ __forceinline__ void mask_scores(float (&rS)[kM][kN][4], const Sequence& s,
                                            const BlockMask& blocks, int row, int col) {
  const int lane = threadIdx.x % 32, first_col = col + 2 * (lane % 4);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    // 16 rows inside the band need no look at the elements: the tile is partial for others.
    const int first_row = row + 16 * m;
    if (first_row + 15 + s.left > col || col + 8 * kN - 1 > first_row + s.right ||
        col + 8 * kN > s.key_length) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first_row + 8 * half + lane / 4;
        const int low = i + s.left - first_col;
        const int high = min(i + s.right, s.key_length - 1) - first_col;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = rS[m][n][2 * half + e];
            if (8 * n + e < low || 8 * n + e > high) score = -INFINITY;
          }
        }
      }
    }
    if (blocks.data != nullptr) {
      const int i = min(first_row, s.query_length - 1);  // rows past the end: any that exists
      const uint32_t groups = blocks.column_groups<kN>(i, col, s.key_length);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if ((groups >> n & 1) == 0) {
          rS[m][n][0] = rS[m][n][1] = rS[m][n][2] = rS[m][n][3] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace jax_flash::attention
