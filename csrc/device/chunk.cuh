// 16 bytes of elements as four registers, which take eight where the compiler sees 16-bit elements.
#pragma once

#include "device/element.cuh"
#include "device/vector.cuh"

namespace jax_flash::device {

template <typename Element>
struct Chunk {
  static constexpr int kSize = 16 / sizeof(Element);
  uint32_t word[4] = {0, 0, 0, 0};

  // Streamed: what nobody reads again soon does not push other lines out of the caches.
  __device__ __forceinline__ static Chunk load_streamed(const Element* source) {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(source));
    Chunk chunk;
    chunk.word[0] = x.x, chunk.word[1] = x.y, chunk.word[2] = x.z, chunk.word[3] = x.w;
    return chunk;
  }
  __device__ __forceinline__ void store_streamed(Element* target) const {
    __stcs(reinterpret_cast<uint4*>(target), uint4{word[0], word[1], word[2], word[3]});
  }

  // Elements [from, to) of the chunk at `source` alone; the others are 0, or stay in memory.
  __device__ __forceinline__ static Chunk load_part(const Element* source, int from, int to) {
    using Bits = std::conditional_t<sizeof(Element) == 2, uint16_t, uint32_t>;
    constexpr int kPerWord = 4 / sizeof(Element);
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < from || i >= to) continue;
      const uint32_t bits = reinterpret_cast<const Bits*>(source)[i];
      chunk.word[i / kPerWord] |= bits << 16 * (i % kPerWord);
    }
    return chunk;
  }
  __device__ __forceinline__ void store_part(Element* target, int from, int to) const {
    using Bits = std::conditional_t<sizeof(Element) == 2, uint16_t, uint32_t>;
    constexpr int kPerWord = 4 / sizeof(Element);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < from || i >= to) continue;
      const uint32_t bits = word[i / kPerWord] >> 16 * (i % kPerWord);
      reinterpret_cast<Bits*>(target)[i] = static_cast<Bits>(bits);
    }
  }

  __device__ __forceinline__ void widen(float (&x)[kSize]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) {
        x[i] = __uint_as_float(word[i]);
      } else {
        const float2 pair = unpack<Element>(word[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    }
  }
  __device__ __forceinline__ static Chunk narrow(const float (&x)[kSize]) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) {
        chunk.word[i] = __float_as_uint(x[i]);
      } else {
        chunk.word[i] = pack<Element>(x[2 * i], x[2 * i + 1]);
      }
    }
    return chunk;
  }

  // The same, but ptxas widens it again instead of keeping floats, twice the registers. `zero` is
  // something that is 0 though no compiler can know it.
  __device__ __forceinline__ Chunk again(uint32_t zero) const {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.word[i] = word[i] ^ zero;
    return chunk;
  }
};

}  // namespace jax_flash::device
