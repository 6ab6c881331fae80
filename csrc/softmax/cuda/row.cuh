// One row of the scores as the vectors of 16 bytes that it touches. Rows of any width follow each
// other without gaps, so that the first and the last vector may hold elements of the neighbours:
//
//     array     ... | n n n 0 1 2 3 4 | 5 6 7 8 9 ... | ... |        n: the row before
//     vector              0                 1           2            column of its first: -shift
//
// Vectors that lie in the row whole are moved whole, the others element by element.
#pragma once

#include "device/chunk.cuh"
#include "softmax/params.h"

namespace jax_flash::softmax {

template <typename Element>
struct Row {
  using Chunk = device::Chunk<Element>;
  static constexpr int kSize = Chunk::kSize;

  int64_t begin;  // of its first element in the array
  int shift;      // elements of the row before in vector 0
  int columns;
  int visible;  // columns before the causal limit

  __device__ Row(const Problem& p, int64_t row, int64_t in_entry)
      : begin(row * p.columns),
        shift(static_cast<int>(begin & (kSize - 1))),
        columns(p.columns),
        visible(p.columns) {
    if (p.row_ids != nullptr) visible = max(0, min(columns - 1, p.row_ids[in_entry]) + 1);
  }

  __device__ int vectors() const { return (shift + columns + kSize - 1) / kSize; }
  __device__ int column(int vector) const { return vector * kSize - shift; }
  __device__ bool is_whole(int column) const { return column >= 0 && column + kSize <= columns; }

  // What lies beyond the limit is not read; it comes as 0.
  __device__ __forceinline__ Chunk load(const Element* array, int column) const {
    Chunk chunk;
    if (column < visible) {
      const Element* source = array + begin + column;
      chunk = is_whole(column) ? Chunk::load_streamed(source)
                               : Chunk::load_part(source, -column, columns - column);
    }
    return chunk;
  }

  __device__ __forceinline__ void store(Element* array, int column, const Chunk& chunk) const {
    Element* target = array + begin + column;
    if (is_whole(column)) return chunk.store_streamed(target);
    chunk.store_part(target, -column, columns - column);
  }
};

// A byte an element of a vector, not 0: hidden.
template <int kSize>
struct Hidden {
  uint32_t word[kSize / 4];

  __device__ __forceinline__ bool operator[](int i) const {
    return (word[i / 4] & (0xffu << 8 * (i % 4))) != 0;
  }

  // Of the columns from `column` on; `mask` is the row's, or null.
  __device__ __forceinline__ static Hidden of(const uint8_t* mask, int column, int visible) {
    Hidden h = {};
    if (column < 0 || column + kSize > visible) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool is_column = column + i >= 0 && column + i < visible;
        const bool is_hidden = !is_column || (mask != nullptr && mask[column + i] != 0);
        h.word[i / 4] |= is_hidden ? 1u << 8 * (i % 4) : 0u;
      }
    } else if (mask != nullptr) {
      const uint8_t* source = mask + column;
      if (reinterpret_cast<uintptr_t>(source) % kSize == 0) {
        using Word = std::conditional_t<kSize == 8, uint2, uint32_t>;
        const Word word = __ldg(reinterpret_cast<const Word*>(source));
        reinterpret_cast<Word&>(h) = word;
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i) h.word[i / 4] |= uint32_t{source[i]} << 8 * (i % 4);
      }
    }
    return h;
  }
};

// row -> its batch entry and its place in there. A division of 64 bits would cost as much as a
// vector's exponentials.
struct Place {
  uint32_t entry;
  int64_t row;

  __device__ Place(const Problem& p, int64_t flat) {
    if (p.rows <= UINT32_MAX) {
      const uint32_t x = flat, y = p.seq_q;
      entry = x / y;
      row = x % y;
    } else {
      entry = flat / p.seq_q;
      row = flat % p.seq_q;
    }
  }
};

}  // namespace jax_flash::softmax
