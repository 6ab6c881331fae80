// Tensor maps: what the copy engine (TMA) must know of an array in global memory. Host code.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_flash::device {

// cuTensorMapEncodeTiled of the driver that the process has loaded, or nullptr; libcuda is never
// linked.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)
               : nullptr;
  }();
  return encoder;
}

// Describes a 16-bit array of four axes, the innermost first and contiguous, for copies of boxes of
// box_rows rows (axis 1) and 64 columns (axis 0), swizzled as SharedTile is. `strides`, in
// elements, are those of axes 1 to 3, multiples of 8. False where the driver refuses.
inline bool encode_tensor_map(const void* data, bool is_bf16, const int64_t (&sizes)[4],
                              const int64_t (&strides)[3], int box_rows, CUtensorMap& out) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  cuuint64_t size[4], stride_bytes[3];
  for (int i = 0; i < 4; ++i) size[i] = static_cast<cuuint64_t>(sizes[i]);
  for (int i = 0; i < 3; ++i) stride_bytes[i] = static_cast<cuuint64_t>(strides[i]) * 2;
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode(&out, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                4, const_cast<void*>(data), size, stride_bytes, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace jax_flash::device
