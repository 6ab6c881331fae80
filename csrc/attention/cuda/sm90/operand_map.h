// An attention operand for the copy engine: [b0, b1, b2, rows, heads, dim] -> a tensor map of
// [batch, heads, rows, dim]. Host code but for the coordinate.
#pragma once

#include <algorithm>

#include "attention/params.h"
#include "device/tensor_map.h"

namespace jax_flash::attention::sm90 {

// The batch axes are folded into one, in which an entry lies at sum(axis[i] * multiplier[i]). An
// axis along which the operand is shared has multiplier 0.
struct OperandMap {
  CUtensorMap map;
  int32_t multiplier[kBatchDims];

  __host__ __device__ int batch(const uint32_t (&axis)[kBatchDims]) const {
    return static_cast<int>(axis[0] * multiplier[0] + axis[1] * multiplier[1] +
                            axis[2] * multiplier[2]);
  }
};

// False where the copy engine cannot serve the operand: batch strides that are no multiples of the
// smallest, or a refusal by the driver.
template <typename Void>
bool make_operand_map(const Problem& p, const View<Void>& view, int64_t rows, int64_t heads,
                      int64_t dim, int box_rows, OperandMap& out) {
  int64_t stride[kBatchDims], unit = 0;
  for (int i = 0; i < kBatchDims; ++i) {
    stride[i] = p.batch_shape[i] > 1 ? view.batch.stride[i] : 0;
    if (stride[i] > 0) unit = unit == 0 ? stride[i] : std::min(unit, stride[i]);
  }
  int64_t entries = 1;
  for (int i = 0; i < kBatchDims; ++i) {
    if (stride[i] != 0 && stride[i] % unit != 0) return false;
    const int64_t multiplier = stride[i] == 0 ? 0 : stride[i] / unit;
    entries += (p.batch_shape[i] - 1) * multiplier;
    if (entries > INT32_MAX) return false;
    out.multiplier[i] = static_cast<int32_t>(multiplier);
  }
  // NOTE: an axis of one entry needs a valid stride all the same.
  const int64_t strides[3] = {view.row_stride, heads > 1 ? view.head_stride : view.row_stride,
                              unit > 0 ? unit : view.row_stride};
  return device::encode_tensor_map(view.data, p.dtype == DType::kBF16, {dim, rows, heads, entries},
                                   strides, box_rows, out.map);
}

}  // namespace jax_flash::attention::sm90
