// Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11),
// and the rule that gives element (i, j) of an attention matrix its own 16-bit draw: the same bits
// on CPU, CUDA and in XLA.
//
// One call serves the eight elements that one thread holds of an mma accumulator pair (rows r, r +
// 8; columns 2q, 2q + 1, 2q + 8, 2q + 9 of a 16 x 16 block), so that a kernel draws exactly as many
// bits as it needs:
//   counter = (16-block column * 4 + q, 16-block row * 8 + r, head, batch),   key = the JAX key's
//   two words word    = (row bit 3) * 2 + (column bit 3),   half = column bit 0
// The transposed accumulator (keys as rows) finds its bits with one exchange between lanes l and l
// ^ 4.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define JAX_FLASH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_FLASH_HOST_DEVICE inline
#endif

namespace jax_flash {

inline constexpr int kPhiloxRounds = 7;
inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Philox4 {
  uint32_t x, y, z, w;
};

JAX_FLASH_HOST_DEVICE Philox4 philox_round(const Philox4& counter, uint32_t key0, uint32_t key1) {
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * counter.x;
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * counter.z;
  return {static_cast<uint32_t>(p1 >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(p0)};
}
JAX_FLASH_HOST_DEVICE Philox4 philox(Philox4 counter, uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return counter;
}

// The same in parts. counter.y, the row of an attention matrix, reaches only half of the words in
// the first three rounds, counter.x, the column, the other half: what each makes of them alone
// serves a whole row or column of calls, and 9 wide products and 11 other operations remain of 14
// and 28.
struct PhiloxRow {
  uint32_t high, low;
};
struct alignas(16) PhiloxColumn {
  uint32_t z2, x3, z3, w3;  // to be combined with the row's, keys included
};
struct PhiloxKeys {  // of rounds 4 to 7
  uint32_t of_x[kPhiloxRounds - 3], of_z[kPhiloxRounds - 3];
};
JAX_FLASH_HOST_DEVICE PhiloxRow philox_row(uint32_t y, uint32_t z, uint32_t key0) {
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * z;
  const uint32_t x1 = static_cast<uint32_t>(p1 >> 32) ^ y ^ key0;
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x1;
  return {static_cast<uint32_t>(p0 >> 32), static_cast<uint32_t>(p0)};
}
JAX_FLASH_HOST_DEVICE PhiloxColumn philox_column(uint32_t x, uint32_t z, uint32_t w, uint32_t key0,
                                                 uint32_t key1) {
  const uint64_t first = static_cast<uint64_t>(kPhiloxM0) * x;
  const uint32_t y1 = kPhiloxM1 * z;
  const uint32_t z1 = static_cast<uint32_t>(first >> 32) ^ w ^ key1;
  const uint64_t second = static_cast<uint64_t>(kPhiloxM1) * z1;
  const uint32_t x2 = static_cast<uint32_t>(second >> 32) ^ y1 ^ (key0 + kPhiloxW0);
  const uint64_t third = static_cast<uint64_t>(kPhiloxM0) * x2;
  return {static_cast<uint32_t>(first) ^ (key1 + kPhiloxW1),
          static_cast<uint32_t>(second) ^ (key0 + 2 * kPhiloxW0),
          static_cast<uint32_t>(third >> 32) ^ (key1 + 2 * kPhiloxW1),
          static_cast<uint32_t>(third)};
}
JAX_FLASH_HOST_DEVICE PhiloxKeys philox_keys(uint32_t key0, uint32_t key1) {
  PhiloxKeys keys{};
  for (int i = 0; i < kPhiloxRounds - 3; ++i) {
    keys.of_x[i] = key0 + (i + 3) * kPhiloxW0;
    keys.of_z[i] = key1 + (i + 3) * kPhiloxW1;
  }
  return keys;
}
JAX_FLASH_HOST_DEVICE Philox4 philox(const PhiloxRow& row, const PhiloxColumn& column,
                                     const PhiloxKeys& keys) {
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * (row.high ^ column.z2);
  Philox4 counter = {static_cast<uint32_t>(p1 >> 32) ^ column.x3, static_cast<uint32_t>(p1),
                     column.z3 ^ row.low, column.w3};
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < kPhiloxRounds - 3; ++i) {
    counter = philox_round(counter, keys.of_x[i], keys.of_z[i]);
  }
  return counter;
}

// The counter of the call that serves element (row, col), and which of its eight draws is the
// element's.
JAX_FLASH_HOST_DEVICE Philox4 dropout_counter(uint32_t row, uint32_t col, uint32_t head,
                                              uint32_t batch) {
  return {(col / 16) * 4 + (col % 8) / 2, (row / 16) * 8 + row % 8, head, batch};
}
JAX_FLASH_HOST_DEVICE uint32_t dropout_draw(const Philox4& bits, uint32_t row, uint32_t col) {
  const uint32_t hi =
      (row & 8) != 0 ? ((col & 8) != 0 ? bits.w : bits.z) : ((col & 8) != 0 ? bits.y : bits.x);
  return (col & 1) != 0 ? hi >> 16 : hi & 0xffffu;
}

}  // namespace jax_flash
