// Rows of Q, K, V, O and dO between XLA's arrays and the kernels' tiles of words (product.h).
#pragma once

#include "attention/cpu/isa/convert.h"
#include "attention/cpu/isa/product.h"
#include "attention/cpu/sequences.h"
#include "attention/params.h"

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {

JAX_FLASH_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
// The stride of an array of words that is walked down its rows: an odd number of 64-byte lines, so
// that rows spread over all sets of the L1 cache.
JAX_FLASH_INLINE int64_t odd_lines(int64_t words) { return round_up(words, 16) | 16; }
JAX_FLASH_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
JAX_FLASH_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out 64-byte aligned arrays from a kernel's scratch; with no base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T = float>
  T* take(int64_t count) {
    char* place = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(place);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// The rows of one batch entry and head, from `row` on.
struct Rows16or32 {
  char* data;
  int64_t stride_bytes;
  DType dtype;
};

template <typename Void>
JAX_FLASH_INLINE Rows16or32 rows_of(const View<Void>& view, DType dtype, const Sequence& sequence,
                                    int64_t head, int64_t row) {
  int64_t offset = row * view.row_stride + head * view.head_stride;
  for (int axis = 0; axis < kBatchDims; ++axis) {
    offset += sequence.batch[axis] * view.batch.stride[axis];
  }
  const int64_t bytes = dtype == DType::kF32 ? 4 : 2;
  char* data = static_cast<char*>(const_cast<void*>(static_cast<const void*>(view.data)));
  return {data + offset * bytes, view.row_stride * bytes, dtype};
}

template <typename Float32>
JAX_FLASH_INLINE Float32* rows_of(const RowView<Float32>& view, const Sequence& sequence,
                                  int64_t head, int64_t row) {
  Float32* data = view.data + head * view.head_stride + row;
  for (int axis = 0; axis < kBatchDims; ++axis) {
    data += sequence.batch[axis] * view.batch.stride[axis];
  }
  return data;
}

// dst [dim] floats <- one row; dim is a multiple of 8, so the last vector may be a short one.
inline void load_row(const char* src, DType dtype, int64_t dim, float* dst) {
  if (dtype == DType::kF32) {
    std::memcpy(dst, src, dim * 4);
    return;
  }
  const bool is_bf16 = dtype == DType::kBF16;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t count = least(kLanes, dim - d);
    Half h{};
    if (count == kLanes) {
      h = load<Half>(src + 2 * d);
    } else {
      std::memcpy(&h, src + 2 * d, 2 * count);
    }
    const Float x = is_bf16 ? from_bf16(h) : from_f16(h);
    if (count == kLanes) {
      store(dst + d, x);
    } else {
      std::memcpy(dst + d, &x, 4 * count);
    }
  }
}

// One row <- src [dim] floats.
inline void store_row(const float* src, DType dtype, int64_t dim, char* dst) {
  if (dtype == DType::kF32) {
    std::memcpy(dst, src, dim * 4);
    return;
  }
  const bool is_bf16 = dtype == DType::kBF16;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t count = least(kLanes, dim - d);
    Float x{};
    if (count == kLanes) {
      x = load<Float>(src + d);
    } else {
      std::memcpy(&x, src + d, 4 * count);
    }
    const Half h = is_bf16 ? to_bf16(x) : to_f16(x);
    std::memcpy(dst + 2 * d, &h, 2 * count);
  }
}

// tile [padded_rows][stride] words <- `rows` rows of `dim` elements; the rest of the tile is zero.
// With kPack = 2 the rows are bfloat16 and stay so, two to a word.
inline void load_tile(Rows16or32 src, int64_t rows, int64_t padded_rows, int64_t dim, float* tile,
                      int64_t stride) {
  const int64_t words = dim / kPack;
  for (int64_t r = 0; r < padded_rows; ++r, tile += stride) {
    if (r >= rows) {
      std::memset(tile, 0, stride * 4);
      continue;
    }
    const char* row = src.data + r * src.stride_bytes;
    if (kPack == 2) {
      std::memcpy(tile, row, dim * 2);
    } else {
      load_row(row, src.dtype, dim, tile);
    }
    std::memset(tile + words, 0, (stride - words) * 4);
  }
}

// Flips every sign (factor < 0) or writes zeros (factor == 0): Q takes the sign of the scale, so
// that the softmax may take its maximum before the multiplication.
inline void apply_sign(float* tile, int64_t words, float factor) {
  if (factor > 0) return;
  const int32_t flip = kPack == 2 ? static_cast<int32_t>(0x80008000u) : INT32_MIN;
  for (int64_t i = 0; i < words; ++i) {
    int32_t word;
    std::memcpy(&word, tile + i, 4);
    word = factor < 0 ? word ^ flip : 0;
    std::memcpy(tile + i, &word, 4);
  }
}

// dst [cols][dst_stride] <- src [rows][src_stride], transposed; rows and cols are multiples of 4.
inline void transpose(const float* src, int64_t rows, int64_t cols, int64_t src_stride, float* dst,
                      int64_t dst_stride) {
  for (int64_t c = 0; c < cols; c += 4) {
    for (int64_t r = 0; r < rows; r += 4) {
      const float* from = src + r * src_stride + c;
      float* to = dst + c * dst_stride + r;
#if defined(__SSE2__)
      __m128 r0 = _mm_loadu_ps(from), r1 = _mm_loadu_ps(from + src_stride),
             r2 = _mm_loadu_ps(from + 2 * src_stride), r3 = _mm_loadu_ps(from + 3 * src_stride);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      _mm_storeu_ps(to, r0);
      _mm_storeu_ps(to + dst_stride, r1);
      _mm_storeu_ps(to + 2 * dst_stride, r2);
      _mm_storeu_ps(to + 3 * dst_stride, r3);
#else
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) to[j * dst_stride + i] = from[i * src_stride + j];
      }
#endif
    }
  }
}

// Two consecutive rows -> the words of one step, for sums over rows: dst [rows / 2][dst_stride].
// Only where a word is a pair; elsewhere the tile itself is already that.
inline void pair_rows(const float* src, int64_t rows, int64_t dim, int64_t src_stride, float* dst,
                      int64_t dst_stride) {
  for (int64_t r = 0; r < rows; r += 2, src += 2 * src_stride, dst += dst_stride) {
    for (int64_t d = 0; d < dim; d += 8) {
      uint16_t even[8], odd[8];
      uint32_t pairs[8];
      std::memcpy(even, src + d / 2, 16);
      std::memcpy(odd, src + src_stride + d / 2, 16);
      for (int i = 0; i < 8; ++i) pairs[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
      std::memcpy(dst + d, pairs, 32);
    }
    std::memset(dst + dim, 0, (dst_stride - dim) * 4);
  }
}

// The results of keys j and j + 1 in kLanes queries, as words: `keys` takes them for a sum over
// keys, `rows` (either may be null) for a sum over queries, where each stays a row of its own.
// A row of words is `stride` floats long in `keys` and stride / kPack in `rows`.
JAX_FLASH_INLINE void store_words(Float even, Float odd, int64_t stride, float* keys, float* rows) {
#if defined(__AVX512BF16__)
  const __m512i both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  if (rows != nullptr) {
    store(rows, _mm512_castsi512_si256(both));
    store(rows + stride / kPack, _mm512_extracti64x4_epi64(both, 1));
  }
  if (keys != nullptr) {
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    store(keys, _mm512_permutexvar_epi16(interleave, both));
  }
#else
  // Words are floats: both sums read the same array.
  float* to = keys != nullptr ? keys : rows;
  store(to, even);
  store(to + stride, odd);
#endif
}

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
