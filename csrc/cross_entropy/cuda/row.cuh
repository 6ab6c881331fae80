// How the threads of a row share its columns. Rows of any width follow each other without gaps, so
// that a row may start anywhere between two 16-byte boundaries:
//
//     origin |    | head | vector | vector | ... | vector | tail |
//
// A vector is 16 bytes; head and tail are the less than a vector before and after, an element a
// thread.
//
// Vectors count from `origin`, the 128-byte boundary before the row, so that a warp's 512 bytes are
// whole sectors of memory, of which no other warp has a part (50257 classes, in place: 3300 GB/s
// without, 3950 with). Threads are (x, y): kThreads threads work on a row; where those are a warp
// or less, a block has several rows.
#pragma once

#include "cross_entropy/params.h"
#include "device/element.cuh"
#include "device/vector.cuh"

namespace jax_flash::cross_entropy {

inline constexpr int kSmallBlock = 256;  // threads, where several rows share a warp or a block
inline constexpr float kLog2e = 1.4426950408889634f;

// Elements [first, first + width) of an array that starts at a multiple of 128 bytes; columns may
// be negative: they count from the row's first one.
template <int kSize>
struct Columns {
  int origin;      // column of vector 0, in (-8 * kSize, 0]
  int begin, end;  // vectors that lie in the row
  int head, tail;  // elements before and after those

  __device__ Columns(int64_t first, int width) {
    origin = -static_cast<int>(first % (8 * kSize));
    begin = (-origin + kSize - 1) / kSize;
    end = max((width - origin) / kSize, begin);
    head = min(column(begin), width);
    tail = max(width - column(end), 0);
  }
  __device__ int column(int vector) const { return origin + vector * kSize; }
  __device__ bool has(int vector) const {
    return static_cast<unsigned>(vector - begin) < static_cast<unsigned>(end - begin);
  }
  // The column of head and tail that is this thread's, or -1.
  __device__ int head_column(int thread) const { return thread < head ? thread : -1; }
  __device__ int tail_column(int thread) const { return thread < tail ? column(end) + thread : -1; }

  // Which of `threads` has this column, where each has every `threads`-th vector.
  __device__ int owner(int x, int threads) const {
    if (x < head) return x;
    const int vector = (x - origin) / kSize;
    return vector < end ? vector % threads : x - column(end);
  }
};

// 16 bytes of a row. They stay whole words until they are used: elements of 16 bits that live in
// registers one by one cost the compiler an instruction each.
template <typename Element>
__device__ __forceinline__ void to_floats(const uint4& words, float (&x)[16 / sizeof(Element)]) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 2) {
      const float2 pair = device::unpack<Element>(word[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    } else {
      x[i] = __uint_as_float(word[i]);
    }
  }
}

}  // namespace jax_flash::cross_entropy
