// Enough of CUDA's language for a host compiler to take the headers of attention/cuda that only
// decide (seqlen, blocks, mask): one lane, whose index is threadIdx.x, and warp functions that
// answer for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#define __device__
#define __host__
#define __forceinline__ inline

struct Index {
  unsigned x = 0, y = 0;
};
inline Index threadIdx, blockDim{1, 1};

using std::max;
using std::min;

template <typename T>
T __shfl_xor_sync(unsigned, T x, int) {
  return x;
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int) {
  return x;
}
template <typename T>
T __shfl_sync(unsigned, T x, int) {
  return x;
}
inline unsigned __ballot_sync(unsigned, bool bit) { return bit ? 1u : 0u; }
inline void __syncwarp() {}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
