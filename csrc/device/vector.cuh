// Elements as floats, and groups of them that one instruction moves (up to 16 bytes a thread).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace jax_flash::device {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename Element>
__device__ __forceinline__ Element from_float(float x) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// kSize neighbours; its address is a multiple of its bytes.
template <typename Element, int kSize>
struct alignas(sizeof(Element) * kSize) Vector {
  static_assert(sizeof(Element) * kSize <= 16 && (kSize & (kSize - 1)) == 0);
  static constexpr int kBytes = sizeof(Element) * kSize;
  using Word = std::conditional_t<
      kBytes == 16, uint4,
      std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

  Element at[kSize];

  // Streamed: what nobody reads again soon does not push other lines out of the caches.
  __device__ __forceinline__ static Vector load_streamed(const Element* source) {
    const Word word = __ldcs(reinterpret_cast<const Word*>(source));
    return reinterpret_cast<const Vector&>(word);
  }
  __device__ __forceinline__ static Vector load(const Element* source) {
    return *reinterpret_cast<const Vector*>(source);
  }
  __device__ __forceinline__ void store(Element* target) const {
    *reinterpret_cast<Vector*>(target) = *this;
  }
  __device__ __forceinline__ void store_streamed(Element* target) const {
    __stcs(reinterpret_cast<Word*>(target), reinterpret_cast<const Word&>(*this));
  }
};

// Runs function.operator()<Element>() for the type that `dtype` names.
template <typename Function>
auto visit(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kF16:
      return function.template operator()<__half>();
    case DType::kBF16:
      return function.template operator()<__nv_bfloat16>();
    default:
      return function.template operator()<float>();
  }
}

}  // namespace jax_flash::device
