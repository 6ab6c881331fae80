// Dropout in the Hopper backward, where a thread holds S^T and dP^T with keys as rows (the map of
// backward_consumer.cuh). The bits are those of common/philox.h.
//
// A call serves one row of queries out of eight and two neighbouring columns of keys, which belong
// to lanes l and l ^ 4 here: of queries 2 q and 2 q + 1 each of the two makes one call, and they
// exchange what they found, one word for 64 queries.
//
// Beside wgmma the integer units are slow: a wide product takes 18 to 25 clocks there, and 4 alone
// (hopper_forward.md). Hence as few as possible of them, flags in the order in which they are used,
// and arithmetic on pairs of 16-bit elements.
#pragma once

#include "attention/cuda/dropout.cuh"
#include "attention/cuda/sm90/backward_arguments.h"
#include "attention/cuda/sm90/backward_consumer.cuh"
#include "common/philox.h"
#include "device/element.cuh"
#include "device/opaque.cuh"
#include "device/warp.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::attention::sm90 {

// What is dropped of 64 queries, a bit each: bit 8 half + n for rS[n][2 half], 16 more for the odd
// one beside it. A thread of 128 queries has two.
using DroppedBits = uint32_t;

// Draws for 64 queries from `row` on and this warp's 16 keys from `col` on, both multiples of 16
// and counted from the sequence's start; kIlp calls at a time, which want 10 registers each.
template <int kIlp>
__device__ __forceinline__ DroppedBits draw_dropped(const DropoutWords& words, uint32_t head_id,
                                                    uint32_t threshold, int row, int col) {
  // NOTE: read here, or what follows from it waits in registers through the steps.
  const uint32_t lane = device::thread_index() % 32, key = lane / 4, is_odd = key & 1;
  const PhiloxColumn column = philox_column(static_cast<uint32_t>(col) / 16 * 4 + key / 2, head_id,
                                            words.batch, words.key0, words.key1);
  const PhiloxKeys keys = philox_keys(words.key0, words.key1);
  const uint32_t threshold_pair = threshold * 0x10001u;
  const auto signs = [=](uint32_t word) { return dropout_pair_signs(word, threshold_pair); };
  uint32_t kept = 0;
#pragma unroll kIlp
  for (int j = 0; j < 4; ++j) {
    const uint32_t y = (static_cast<uint32_t>(row) / 16 + j) * 8 + lane % 4 * 2 + is_odd;
    const Philox4 draws = philox(philox_row(y, head_id, words.key0), column, keys);
    // Bytes, each 0 or 255: the even key, the odd key; the even key + 8, the odd key + 8.
    constexpr uint32_t kSigns = 0xfdb9, kBits = 0x01010101;
    const uint32_t first = ptx::permute_bytes<kSigns>(signs(draws.x), signs(draws.y));
    const uint32_t last = ptx::permute_bytes<kSigns>(signs(draws.z), signs(draws.w));
    kept |= first & kBits << 2 * j;
    kept |= last & kBits << (2 * j + 1);
  }
  const uint32_t other = __shfl_xor_sync(device::kWarp, kept, 4);
  return ~__byte_perm(kept, other, is_odd ? 0x3175 : 0x6420);
}

// Of h = P / 2 and s, which is h with a sign where P is dropped: P where it is kept, and (from that
// and s) where it is dropped, and zero elsewhere.
template <typename Element>
__device__ __forceinline__ uint32_t kept_part(uint32_t half, uint32_t is_signed) {
  return device::add<Element>(half, is_signed);
}
template <typename Element>
__device__ __forceinline__ uint32_t dropped_part(uint32_t kept, uint32_t is_signed) {
  return device::multiply_add<Element>(is_signed, device::pack<Element>(-2.0f, -2.0f), kept);
}

// P / 2 of the j-th 16 queries gets its signs, and P^T is dropped, as operand A.
template <typename Element>
__device__ __forceinline__ void drop(uint32_t (&rP)[4], const DroppedBits* dropped, int j,
                                     uint32_t (&rKept)[4]) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int n = 2 * j + word / 2;
    const uint32_t half = rP[word];
    rP[word] |= dropped[n / 8] << (15 - 8 * (word % 2) - n % 8) & 0x80008000u;
    rKept[word] = kept_part<Element>(half, rP[word]);
  }
}
template <typename Element, int kGroups>
__device__ __forceinline__ void drop(uint32_t (&rP)[kGroups][4],
                                     const DroppedBits (&dropped)[kGroups / 4],
                                     uint32_t (&rKept)[kGroups][4]) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) drop<Element>(rP[j], dropped, j, rKept[j]);
}

// dV += P^T dO, with what dropout keeps of P, if any of it is dropped; see drop.
template <typename Element, bool kHasDropout, typename QueryTile, int kN, int kGroups>
__device__ __forceinline__ void accumulate_kept(float (&rDV)[kN][4], uint32_t (&rP)[kGroups][4],
                                                const DroppedBits (&dropped)[kGroups / 4],
                                                uint32_t (&rKept)[kGroups][4],
                                                const QueryTile& gradients) {
  if constexpr (kHasDropout) {
    drop<Element>(rP, dropped, rKept);
    accumulate<Element>(rDV, rKept, gradients);
  } else {
    accumulate<Element>(rDV, rP, gradients);
  }
}

// -delta of the columns of the j-th 16 queries, from where they lie in the order of stats_index.
__device__ __forceinline__ uint2 load_minus_delta(const uint32_t* minus_delta, int j) {
  return *reinterpret_cast<const uint2*>(minus_delta + 8 * j + 2 * (threadIdx.x % 4));
}

// dS = P * (Z dP - delta) of the j-th 16 queries, where dP begins with -delta: the kept part of P
// times that, and the dropped part times -delta alone.
template <typename Element, int kN>
__device__ __forceinline__ void differentiate(const float (&rDP)[kN][4],
                                              const uint32_t (&rSigned)[4],
                                              const uint32_t (&rKept)[4], uint2 minus_delta, int j,
                                              uint32_t (&rDS)[4]) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float (&dp)[4] = rDP[2 * j + word / 2];
    const uint32_t of_dropped =
        device::multiply<Element>(dropped_part<Element>(rKept[word], rSigned[word]),
                                  word < 2 ? minus_delta.x : minus_delta.y);
    rDS[word] = device::multiply_add<Element>(
        rKept[word], device::pack<Element>(dp[word % 2 * 2], dp[word % 2 * 2 + 1]), of_dropped);
  }
}
// The same where dP does not begin so.
template <typename Element, int kN>
__device__ __forceinline__ void differentiate(float (&rDP)[kN][4], const uint32_t (&rSigned)[4],
                                              const uint32_t (&rKept)[4], const float* delta, int j,
                                              uint32_t (&rDS)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(delta + 16 * j + 4 * (threadIdx.x % 4));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rDP[2 * j][2 * half] -= x.x;
    rDP[2 * j][2 * half + 1] -= x.y;
    rDP[2 * j + 1][2 * half] -= x.z;
    rDP[2 * j + 1][2 * half + 1] -= x.w;
  }
  const uint2 minus = {device::pack<Element>(-x.x, -x.y), device::pack<Element>(-x.z, -x.w)};
  differentiate<Element>(rDP, rSigned, rKept, minus, j, rDS);
}

}  // namespace jax_flash::attention::sm90
