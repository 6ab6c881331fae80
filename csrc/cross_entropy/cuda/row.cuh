// How the threads of a row share its columns. Rows of any width follow each other without gaps, so
// that a row may start between two 16-byte boundaries:
//
//     | head | vectors of 16 bytes ... | tail |      head, tail: less than a vector, an element each
//
// Threads are (x, y): x threads work on a row, a warp or a block; where it is a warp, the block has
// y rows. Of `kUnroll` vectors a thread, all are loaded before the first is used.
#pragma once

#include "cross_entropy/params.h"
#include "device/vector.cuh"

namespace jax_flash::cross_entropy {

inline constexpr float kLog2e = 1.4426950408889634f;

// Elements [first, first + width) of an array that starts at a multiple of 16 bytes.
template <int kSize>
struct Columns {
  int head, vectors, tail;

  __device__ Columns(int64_t first, int width) {
    head = min(static_cast<int>(-first & (kSize - 1)), width);
    vectors = (width - head) / kSize;
    tail = width - head - vectors * kSize;
  }
  __device__ int column_of_vector(int i) const { return head + i * kSize; }
  __device__ int column_of_tail(int i) const { return head + vectors * kSize + i; }

  // Which of `threads` has this column, where each has every `threads`-th vector, head and tail
  // element.
  __device__ int owner(int column, int threads) const {
    if (column < head) return column;
    const int i = (column - head) / kSize;
    return i < vectors ? i % threads : (column - head) % kSize;
  }
};

}  // namespace jax_flash::cross_entropy
