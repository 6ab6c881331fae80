// C = A B with queries, or a head's dims, in the vector lanes: every product of attention in one
// register-blocked kernel.
//
// Operands are arrays of 32-bit words. A word is one float, or, where the CPU multiplies pairs of
// bfloat16 (kPack = 2), two consecutive elements of the summed axis; one step of the sum is one
// word. A's words are broadcast one by one, so A needs no packing and may be walked either way; B
// is [steps][lanes] with the lanes contiguous.
#pragma once

#include "attention/cpu/isa/vec.h"

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {

#if defined(__AVX512BF16__)
inline constexpr int kPack = 2;
JAX_FLASH_INLINE Float multiply_add(Float a, Float b, Float c) {
  return _mm512_dpbf16_ps(c, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}
#else
inline constexpr int kPack = 1;
JAX_FLASH_INLINE Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
#endif

// kRowMajor: A is [rows][steps]. kStepMajor: A is [steps][rows].
enum class Order { kRowMajor, kStepMajor };
// What C holds before: C = A B, C += A B, or C = C * factor + A B with one factor a lane.
enum class Start { kZero, kAdd, kScale };

struct Operand {
  const float* data;
  int64_t stride;  // words from one row (kRowMajor, B: from one step) to the next
};
struct Result {
  float* data;
  int64_t stride;
};

// kBlockRows rows x kVecs vectors of C, held in registers over all steps.
template <Order order, Start start, int kVecs>
JAX_FLASH_INLINE void product_block(Operand a, Operand b, Result c, int64_t steps,
                                    const float* factor) {
  Float acc[kBlockRows][kVecs];
#pragma GCC unroll 16
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (start == Start::kZero) {
        acc[m][v] = Float{};
      } else {
        acc[m][v] = load<Float>(c.data + m * c.stride + v * kLanes);
        if constexpr (start == Start::kScale) acc[m][v] *= load<Float>(factor + v * kLanes);
      }
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    Float lanes[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) lanes[v] = load<Float>(b.data + k * b.stride + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kBlockRows; ++m) {
      const Float word =
          splat(order == Order::kRowMajor ? a.data[m * a.stride + k] : a.data[k * a.stride + m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[m][v] = multiply_add(word, lanes[v], acc[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c.data + m * c.stride + v * kLanes, acc[m][v]);
  }
}

// One column of blocks: all rows (a multiple of kBlockRows) of C under kVecs vectors.
template <Order order, Start start, int kVecs>
void product_column(Operand a, int64_t rows, Operand b, Result c, int64_t steps,
                    const float* factor) {
  const int64_t a_step = (order == Order::kRowMajor ? a.stride : 1) * kBlockRows;
  for (int64_t m = 0; m < rows; m += kBlockRows) {
    product_block<order, start, kVecs>(a, b, c, steps, factor);
    a.data += a_step;
    c.data += kBlockRows * c.stride;
  }
}

// How many of the `vecs` vectors that are left the next column of blocks takes: four go as 2 + 2,
// because a column of one is short of independent sums.
JAX_FLASH_INLINE int column_vecs(int64_t vecs) {
  if (vecs == 4) return 2;
  return vecs < kBlockVecs ? static_cast<int>(vecs) : kBlockVecs;
}

// How many steps' worth of B a column of blocks runs through: 128 x 3 vectors of 64 bytes are 24
// KB, which stay in the L1 cache while the rows of A pass by.
inline constexpr int64_t kStepBlock = 128;

// C[rows][vecs * kLanes] from A and B over `steps` words; rows is a multiple of 8.
template <Order order, Start start>
void product(Operand a, int64_t rows, Operand b, int64_t vecs, Result c, int64_t steps,
             const float* factor = nullptr) {
  const int64_t now = steps < kStepBlock ? steps : kStepBlock;
  for (int64_t v = 0; v < vecs;) {
    const int width = column_vecs(vecs - v);
    const Operand b_column = {b.data + v * kLanes, b.stride};
    const Result c_column = {c.data + v * kLanes, c.stride};
    const float* column_factor = start == Start::kScale ? factor + v * kLanes : nullptr;
    if (width == 1) {
      product_column<order, start, 1>(a, rows, b_column, c_column, now, column_factor);
    } else if (width == 2) {
      product_column<order, start, 2>(a, rows, b_column, c_column, now, column_factor);
    } else if constexpr (kBlockVecs == 3) {
      product_column<order, start, 3>(a, rows, b_column, c_column, now, column_factor);
    }
    v += width;
  }
  if (steps > now) {
    a.data += now * (order == Order::kRowMajor ? 1 : a.stride);
    b.data += now * b.stride;
    product<order, Start::kAdd>(a, rows, b, vecs, c, steps - now);
  }
}

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
