// One entry of the leading batch axes.
#pragma once

#include "common/batch.h"

namespace jax_flash::device {

struct BatchIndex {
  uint32_t axis[kBatchDims];

  BatchIndex() = default;
  // `p` is any struct with a batch_shape; `flat` counts its entries.
  template <typename Problem>
  __device__ BatchIndex(const Problem& p, uint32_t flat) {
    const uint32_t b1 = p.batch_shape[1], b2 = p.batch_shape[2];
    axis[2] = flat % b2;
    axis[1] = flat / b2 % b1;
    axis[0] = flat / b2 / b1;
  }
  __device__ int64_t offset(const BatchStrides& b) const {
    return axis[0] * b.stride[0] + axis[1] * b.stride[1] + axis[2] * b.stride[2];
  }
  template <typename T>
  __device__ const T* of(const PerBatch<T>& vector) const {
    return vector.data == nullptr ? nullptr : vector.data + offset(vector.batch);
  }
};

}  // namespace jax_flash::device
