// The pairs of a head that a thread turns at once, as floats.
//
//     half         chunk of x1 ... chunk of x2      neighbours of both halves: two chunks of 16
//     bytes interleaved  chunk of x1 x2 x1 x2 ...         one chunk of 16 bytes unaligned    one
//     x1, one x2
#pragma once

#include "device/chunk.cuh"

namespace jax_flash::rotary {

template <typename Element, bool kInterleaved, bool kAligned>
struct Pairs;

template <typename Element>
struct Pairs<Element, false, true> {
  using Chunk = device::Chunk<Element>;
  static constexpr int kCount = Chunk::kSize;  // pairs
  Chunk first, second;

  __device__ __forceinline__ void load(const Element* head, int j, int pairs) {
    first = Chunk::load_streamed(head + j);
    second = Chunk::load_streamed(head + pairs + j);
  }
  __device__ __forceinline__ void store(Element* head, int j, int pairs) const {
    first.store_streamed(head + j);
    second.store_streamed(head + pairs + j);
  }
  __device__ __forceinline__ void widen(float (&x1)[kCount], float (&x2)[kCount]) const {
    first.widen(x1);
    second.widen(x2);
  }
  __device__ __forceinline__ void narrow(const float (&x1)[kCount], const float (&x2)[kCount]) {
    first = Chunk::narrow(x1);
    second = Chunk::narrow(x2);
  }
};

template <typename Element>
struct Pairs<Element, true, true> {
  using Chunk = device::Chunk<Element>;
  static constexpr int kCount = Chunk::kSize / 2;
  Chunk chunk;

  __device__ __forceinline__ void load(const Element* head, int j, int) {
    chunk = Chunk::load_streamed(head + 2 * j);
  }
  __device__ __forceinline__ void store(Element* head, int j, int) const {
    chunk.store_streamed(head + 2 * j);
  }
  __device__ __forceinline__ void widen(float (&x1)[kCount], float (&x2)[kCount]) const {
    float x[2 * kCount];
    chunk.widen(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x1[i] = x[2 * i], x2[i] = x[2 * i + 1];
  }
  __device__ __forceinline__ void narrow(const float (&x1)[kCount], const float (&x2)[kCount]) {
    float x[2 * kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[2 * i] = x1[i], x[2 * i + 1] = x2[i];
    chunk = Chunk::narrow(x);
  }
};

template <typename Element, bool kInterleaved>
struct Pairs<Element, kInterleaved, false> {
  static constexpr int kCount = 1;
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
  __device__ __forceinline__ void widen(float (&x1)[1], float (&x2)[1]) const {
    x1[0] = device::to_float(first);
    x2[0] = device::to_float(second);
  }
  __device__ __forceinline__ void narrow(const float (&x1)[1], const float (&x2)[1]) {
    first = device::from_float<Element>(x1[0]);
    second = device::from_float<Element>(x2[0]);
  }
};

}  // namespace jax_flash::rotary
