// Leading batch axes: a call has up to three, and an operand that is shared along one of them (vmap
// with in_axes=None) has stride 0 there, so nothing is ever repeated in memory. _ops/_batch.py
// makes exactly three of however many there are.
#pragma once

#include <cstdint>

namespace jax_flash {

inline constexpr int kBatchDims = 3;

// Element strides of the leading batch axes; 0 where the operand is shared.
struct BatchStrides {
  int64_t stride[kBatchDims] = {0, 0, 0};
};

// An array [b0, b1, b2, ...], contiguous beyond its batch axes. data == nullptr: the option is off.
template <typename T>
struct PerBatch {
  const T* data = nullptr;
  BatchStrides batch;
};

}  // namespace jax_flash
