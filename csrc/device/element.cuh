// The 16-bit element types and how pairs of them are packed into a register, the even column low.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jax_flash::device {

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Two elements, unchanged.
template <typename Element>
__device__ __forceinline__ uint32_t pack_elements(Element low, Element high) {
  return uint32_t{reinterpret_cast<const uint16_t&>(high)} << 16 |
         reinterpret_cast<const uint16_t&>(low);
}

// Two accumulators side by side (16 columns) -> operand A of the next mma.
template <typename Element>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4],
                                             const float (&right)[4]) {
  a[0] = pack<Element>(left[0], left[1]);
  a[1] = pack<Element>(left[2], left[3]);
  a[2] = pack<Element>(right[0], right[1]);
  a[3] = pack<Element>(right[2], right[3]);
}

template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// The products of two pairs, rounded.
template <typename Element>
__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  const Pair product = __hmul2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

// Their sums, and products plus a pair, rounded once.
template <typename Element>
__device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  const Pair sum = __hadd2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(sum);
}
template <typename Element>
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  const Pair sum = __hfma2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b),
                           reinterpret_cast<const Pair&>(c));
  return reinterpret_cast<const uint32_t&>(sum);
}

}  // namespace jax_flash::device
