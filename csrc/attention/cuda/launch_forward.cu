// Run-time dtype and head dim -> the forward kernel, once.
#include "attention/cuda/instances.h"

namespace jax_flash::attention {

const char* launch_attention_forward(const ForwardParams& p, cudaStream_t stream) {
  if (p.mask.block_rows % 16 != 0 || p.mask.block_cols % 16 != 0) {
    return "jax_flash: block_size: expected multiples of 16";
  }
  if (p.dtype == DType::kF32) {
    return with_coarse_head_dim(p,
                                [&]<int kHeadDim>() { return forward_f32<kHeadDim>(p, stream); });
  }
  return with_head_dim(p, [&]<int kHeadDim>() -> const char* {
    switch (p.dtype) {
      case DType::kBF16:
        return forward_sm80<__nv_bfloat16, kHeadDim>(p, stream);
      case DType::kF16:
        return forward_sm80<__half, kHeadDim>(p, stream);
      case DType::kF32:
        break;
    }
    return "jax_flash: dtype: expected float32, float16 or bfloat16";
  });
}

}  // namespace jax_flash::attention
