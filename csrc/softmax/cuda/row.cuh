// One row of the scores as the vectors of 16 bytes that it touches. Rows of any width follow each
// other without gaps, so that the first and the last vector may hold elements of the neighbours:
//
//     array     ... | n n n 0 1 2 3 4 | 5 6 7 8 9 ... | ... |        n: the row before
//     vector              0                 1           2            column of its first: -shift
//
// Vectors that lie in the row whole are moved whole, the others element by element. kWhole: all
// are, since rows and their masks start on vectors; the code for the others is then not there.
#pragma once

#include "device/chunk.cuh"
#include "device/places.cuh"
#include "softmax/params.h"

namespace jax_flash::softmax {

template <typename Element, bool kWhole>
struct Row {
  using Chunk = device::Chunk<Element>;
  static constexpr int kSize = Chunk::kSize;

  int64_t begin;  // of its first element in the array
  int shift;      // elements of the row before in vector 0
  int columns;
  int visible;  // columns before the causal limit

  // Row `flat`, counted through all batch entries; an empty one where there are no more.
  __device__ Row(const Problem& p, const device::Places& places, int64_t flat)
      : begin(min(flat, p.rows - 1) * p.columns),
        shift(kWhole ? 0 : static_cast<int>(begin & (kSize - 1))),
        columns(flat < p.rows ? p.columns : 0),
        visible(columns) {
    if (p.row_ids == nullptr) return;
    const int32_t id = p.row_ids[places.of(min(flat, p.rows - 1)).row];
    visible = max(0, min(columns - 1, id) + 1);
  }

  __device__ int column(int vector) const { return vector * kSize - shift; }
  __device__ bool is_whole(int column) const {
    return kWhole || (column >= 0 && column + kSize <= columns);
  }

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
template <int kSize, bool kWhole>
struct Hidden {
  using Word = std::conditional_t<kSize == 8, uint64_t, uint32_t>;
  Word bytes = 0;

  __device__ __forceinline__ bool operator[](int i) const {
    return (static_cast<uint32_t>(bytes >> 32 * (i / 4)) & (0xffu << 8 * (i % 4))) != 0;
  }

  // Of the columns from `column` on; `mask` is the row's, or null.
  __device__ __forceinline__ static Hidden of(const uint8_t* mask, int column, int visible) {
    Hidden h;
    if constexpr (kWhole) {
      if (mask != nullptr) {
        h.bytes = __ldg(reinterpret_cast<const Word*>(mask + column));
      } else if (column + kSize > visible) {
        h.bytes = ~Word{0} << 8 * (visible - column);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const bool is_column = column + i >= 0 && column + i < visible;
        const bool is_hidden = !is_column || (mask != nullptr && mask[column + i] != 0);
        h.bytes |= static_cast<Word>(is_hidden) << 8 * i;
      }
    }
    return h;
  }
};

}  // namespace jax_flash::softmax
