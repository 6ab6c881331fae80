// What a thread turns of a head: some neighbouring pairs.
//
//     Half         16 bytes of x1, 16 bytes of x2
//     Interleaved  16 bytes of x1 x2 x1 x2 ...
//     One          one x1, one x2: what lies on no boundary
//
// kCount are its pairs, of kHeads neighbouring heads: 32 bytes. kCopied are the elements that a
// thread takes of those that are not turned. kBlocks of 128 threads are on an SM at once.
#pragma once

#include "device/element.cuh"
#include "device/vector.cuh"

namespace jax_flash::rotary {

// Cosines and sines of one row's pairs [j, j + kCount).
template <int kCount>
struct Angles {
  float cos[kCount], sin[kCount];

  __device__ __forceinline__ void load(const float* cosines, const float* sines, float sign) {
    constexpr int kSize = kCount < 4 ? kCount : 4;
    using Vector = device::Vector<float, kSize>;
#pragma unroll
    for (int i = 0; i < kCount; i += kSize) {
      const Vector c = Vector::load(cosines + i), s = Vector::load(sines + i);
#pragma unroll
      for (int k = 0; k < kSize; ++k) cos[i + k] = c.at[k], sin[i + k] = sign * s.at[k];
    }
  }
  __device__ __forceinline__ void fill(float x) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) cos[i] = sin[i] = x;
  }
  __device__ __forceinline__ float2 turn(int i, float x1, float x2) const {
    return {x1 * cos[i] - x2 * sin[i], x1 * sin[i] + x2 * cos[i]};
  }
};

// 16 bytes of elements as whole registers: ptxas takes one an element where it sees elements.
template <typename Element>
struct Words {
  static constexpr int kSize = 16 / sizeof(Element);
  uint32_t word[4];

  // Streamed: what nobody reads again soon does not push the tables out of the caches.
  __device__ __forceinline__ void load(const Element* source) {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(source));
    word[0] = x.x, word[1] = x.y, word[2] = x.z, word[3] = x.w;
  }
  __device__ __forceinline__ void store(Element* target) const {
    __stcs(reinterpret_cast<uint4*>(target), uint4{word[0], word[1], word[2], word[3]});
  }
  __device__ __forceinline__ float2 pair(int i) const {  // elements 2 i and 2 i + 1
    if constexpr (sizeof(Element) == 2) {
      return device::unpack<Element>(word[i]);
    } else {
      return {__uint_as_float(word[2 * i]), __uint_as_float(word[2 * i + 1])};
    }
  }
  __device__ __forceinline__ void set_pair(int i, float2 x) {
    if constexpr (sizeof(Element) == 2) {
      word[i] = device::pack<Element>(x.x, x.y);
    } else {
      word[2 * i] = __float_as_uint(x.x);
      word[2 * i + 1] = __float_as_uint(x.y);
    }
  }
};

template <typename Element_>
struct Half {
  using Element = Element_;
  static constexpr int kCount = 16 / sizeof(Element), kCopied = kCount;
  static constexpr int kHeads = 1, kBlocks = 10;
  Words<Element> first, second;

  __device__ __forceinline__ void load(const Element* head, int j, int pairs) {
    first.load(head + j);
    second.load(head + pairs + j);
  }
  __device__ __forceinline__ void store(Element* head, int j, int pairs) const {
    first.store(head + j);
    second.store(head + pairs + j);
  }
  __device__ __forceinline__ void turn(const Angles<kCount>& angles) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 x1 = first.pair(i), x2 = second.pair(i);
      const float2 a = angles.turn(2 * i, x1.x, x2.x), b = angles.turn(2 * i + 1, x1.y, x2.y);
      first.set_pair(i, {a.x, b.x});
      second.set_pair(i, {a.y, b.y});
    }
  }
  __device__ __forceinline__ static void copy(const Element* source, Element* target) {
    Words<Element> words;
    words.load(source);
    words.store(target);
  }
};

template <typename Element_>
struct Interleaved {
  using Element = Element_;
  static constexpr int kCount = 8 / sizeof(Element), kCopied = 2 * kCount;
  static constexpr int kHeads = 2, kBlocks = 10;
  Words<Element> words;

  __device__ __forceinline__ void load(const Element* head, int j, int) {
    words.load(head + 2 * j);
  }
  __device__ __forceinline__ void store(Element* head, int j, int) const {
    words.store(head + 2 * j);
  }
  __device__ __forceinline__ void turn(const Angles<kCount>& angles) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float2 x = words.pair(i);
      words.set_pair(i, angles.turn(i, x.x, x.y));
    }
  }
  __device__ __forceinline__ static void copy(const Element* source, Element* target) {
    Half<Element>::copy(source, target);
  }
};

template <typename Element_, bool kInterleaved>
struct One {
  using Element = Element_;
  static constexpr int kCount = 1, kCopied = 1, kHeads = 1, kBlocks = 16;
  Element first, second;

  __device__ __forceinline__ static int place(int j) { return kInterleaved ? 2 * j : j; }
  __device__ __forceinline__ static int step(int pairs) { return kInterleaved ? 1 : pairs; }

  __device__ __forceinline__ void load(const Element* head, int j, int pairs) {
    first = head[place(j)];
    second = head[place(j) + step(pairs)];
  }
  __device__ __forceinline__ void store(Element* head, int j, int pairs) const {
    head[place(j)] = first;
    head[place(j) + step(pairs)] = second;
  }
  __device__ __forceinline__ void turn(const Angles<1>& angles) {
    const float2 out = angles.turn(0, device::to_float(first), device::to_float(second));
    first = device::from_float<Element>(out.x);
    second = device::from_float<Element>(out.y);
  }
  __device__ __forceinline__ static void copy(const Element* source, Element* target) {
    *target = *source;
  }
};

}  // namespace jax_flash::rotary
