// Dropout in the Hopper backward, where a thread holds S^T and dP^T with keys as rows (the map of
// backward_consumer.cuh). The bits are those of common/philox.h.
//
// A call serves one row of queries out of eight and two neighbouring columns of keys, which belong
// to lanes l and l ^ 4 here: of queries 2 q and 2 q + 1 each of the two makes one call, and they
// exchange what they found, one word for 64 queries.
#pragma once

#include "attention/cuda/dropout.cuh"
#include "attention/cuda/sm90/backward_arguments.h"
#include "common/philox.h"
#include "device/element.cuh"
#include "device/opaque.cuh"
#include "device/warp.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::attention::sm90 {

// Flags of draws: bits 15 and 31 of the result say whether the halves of `word` are at least the
// threshold. Both halves are subtracted at once: their top bits, out of the way, catch the borrows.
class Threshold {
 public:
  __device__ __forceinline__ explicit Threshold(uint32_t threshold)
      : low_((threshold & 0x7fffu) * 0x10001u), is_small_(threshold < 0x8000u ? ~0u : 0u) {}
  __device__ __forceinline__ uint32_t passes(uint32_t word) const {
    const uint32_t low = (word | 0x80008000u) - low_;
    // With a top bit in the threshold both must be set, else either.
    return (word & low) | ((word | low) & is_small_);
  }

 private:
  uint32_t low_, is_small_;
};

// What is kept of 64 queries: bit n of byte e is of rS[n][e]. A thread of 128 queries has two.
using KeptBits = uint32_t;

// Draws for 64 queries from `row` on and this warp's 16 keys from `col` on, both multiples of 16
// and counted from the sequence's start.
__device__ __forceinline__ KeptBits draw_kept(const DropoutWords& words, uint32_t head_id,
                                              const Threshold& threshold, int row, int col) {
  // NOTE: read here, or what follows from it waits in registers through the steps.
  const uint32_t lane = device::thread_index() % 32, key = lane / 4, is_odd = key & 1;
  const PhiloxColumn column = philox_column(static_cast<uint32_t>(col) / 16 * 4 + key / 2, head_id,
                                            words.batch, words.key0, words.key1);
  const PhiloxKeys keys = philox_keys(words.key0, words.key1);
  uint32_t found = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t y = (static_cast<uint32_t>(row) / 16 + j) * 8 + lane % 4 * 2 + is_odd;
    const Philox4 draws = philox(philox_row(y, head_id, words.key0), column, keys);
    // Bytes: the even key, the odd key; the even key + 8, the odd key + 8. Each 0 or 255.
    constexpr uint32_t kSigns = 0xfdb9, kBits = 0x01010101;
    const uint32_t first =
        ptx::permute_bytes<kSigns>(threshold.passes(draws.x), threshold.passes(draws.y));
    const uint32_t last =
        ptx::permute_bytes<kSigns>(threshold.passes(draws.z), threshold.passes(draws.w));
    found |= first & kBits << 2 * j;
    found |= last & kBits << (2 * j + 1);
  }
  const uint32_t other = __shfl_xor_sync(device::kWarp, found, 4);
  return __byte_perm(found, other, is_odd ? 0x3715 : 0x6240);
}

// All ones or zeros for rS[n][2 half] and rS[n][2 half + 1], by their bits.
__device__ __forceinline__ uint32_t spread_pair(uint32_t bits, int n, int half) {
  const uint32_t signs = bits << (7 - n);
  return half == 0 ? ptx::permute_bytes<0x9988>(signs, 0) : ptx::permute_bytes<0xbbaa>(signs, 0);
}

// P^T as operand A, dropped.
template <int kGroups>
__device__ __forceinline__ void drop(const uint32_t (&rP)[kGroups][4],
                                     const KeptBits (&kept)[kGroups / 4],
                                     uint32_t (&rDropped)[kGroups][4]) {
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int n = 2 * j + word / 2;
      rDropped[j][word] = rP[j][word] & spread_pair(kept[n / 8], n % 8, word % 2);
    }
  }
}

// A pair of P * (Z dP - delta), from dP - delta and -delta. `dropped` has ones where it is. NOTE:
// this wants masks of what is dropped, or ptxas keeps those of what is kept since `drop`: 16
// registers for 64 queries.
template <typename Element>
__device__ __forceinline__ uint32_t differentiate_pair(uint32_t p, uint32_t dropped, float even,
                                                       float odd, uint32_t of_dropped) {
  const uint32_t of_kept = device::pack<Element>(even, odd);
  return device::multiply<Element>(p, (of_kept & ~dropped) | (of_dropped & dropped));
}

// -delta of the columns of the j-th 16 queries, from where they lie in the order of stats_index.
__device__ __forceinline__ uint2 load_minus_delta(const uint32_t* minus_delta, int j) {
  return *reinterpret_cast<const uint2*>(minus_delta + 8 * j + 2 * (threadIdx.x % 4));
}

// dS = P * (Z dP - delta) of the j-th 16 queries, where dP begins with -delta. `minus_delta` has
// -delta in 16 bits, in the order of stats_index.
template <typename Element, int kN>
__device__ __forceinline__ void differentiate(const float (&rDP)[kN][4], const uint32_t (&rP)[4],
                                              const KeptBits (&kept)[kN / 8],
                                              const uint32_t* minus_delta, int j,
                                              uint32_t (&rDS)[4]) {
  const uint2 x = load_minus_delta(minus_delta, j);
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int n = 2 * j + word / 2;
    const float (&dp)[4] = rDP[n];
    rDS[word] =
        differentiate_pair<Element>(rP[word], spread_pair(~kept[n / 8], n % 8, word % 2),
                                    dp[word % 2 * 2], dp[word % 2 * 2 + 1], word < 2 ? x.x : x.y);
  }
}
// The same where dP does not.
template <typename Element, int kN>
__device__ __forceinline__ void differentiate(const float (&rDP)[kN][4], const uint32_t (&rP)[4],
                                              const KeptBits (&kept)[kN / 8], const float* delta,
                                              int j, uint32_t (&rDS)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(delta + 16 * j + 4 * (threadIdx.x % 4));
  const uint32_t minus[2] = {device::pack<Element>(-x.x, -x.y), device::pack<Element>(-x.z, -x.w)};
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int n = 2 * j + word / 2;
    const float (&dp)[4] = rDP[n];
    const float even = word < 2 ? x.x : x.z, odd = word < 2 ? x.y : x.w;
    rDS[word] = differentiate_pair<Element>(rP[word], spread_pair(~kept[n / 8], n % 8, word % 2),
                                            dp[word % 2 * 2] - even, dp[word % 2 * 2 + 1] - odd,
                                            minus[word / 2]);
  }
}

// P, which is never negative, of the j-th 16 queries, with a sign where it is dropped: how it is
// told to the other CTA of a pair.
__device__ __forceinline__ void sign_dropped(const uint32_t (&rP)[4], KeptBits kept, int j,
                                             uint32_t (&rSigned)[4]) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    rSigned[word] = rP[word] | (~spread_pair(kept, 2 * j + word / 2, word % 2) & 0x80008000u);
  }
}
// The first of the two `differentiate` there.
template <typename Element, int kN>
__device__ __forceinline__ void differentiate_signed(const float (&rDP)[kN][4],
                                                     const uint32_t (&rSigned)[4],
                                                     uint2 minus_delta, int j, uint32_t (&rDS)[4]) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float (&dp)[4] = rDP[2 * j + word / 2];
    const uint32_t dropped = ptx::permute_bytes<0xbb99>(rSigned[word], 0);
    rDS[word] =
        differentiate_pair<Element>(rSigned[word] & 0x7fff7fffu, dropped, dp[word % 2 * 2],
                                    dp[word % 2 * 2 + 1], word < 2 ? minus_delta.x : minus_delta.y);
  }
}

}  // namespace jax_flash::attention::sm90
