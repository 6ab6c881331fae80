// Run-time dtype and head dim -> the backward kernels, once.
#include "attention/cuda/architecture.h"
#include "attention/cuda/instances.h"

namespace jax_flash::attention {
namespace {

template <typename Element, int kHeadDim>
const char* launch_16_bit(const BackwardParams& p, cudaStream_t stream) {
  if (runs_sm90_kernels()) {
    const char* error = p.dropout.threshold > 0
                            ? backward_sm90<Element, kHeadDim, true>(p, stream)
                            : backward_sm90<Element, kHeadDim, false>(p, stream);
    if (error != kNotCovered) return error;
  }
  return backward_sm80<Element, kHeadDim>(p, stream);
}

}  // namespace

const char* launch_attention_backward(const BackwardParams& p, cudaStream_t stream) {
  if (p.mask.block_rows % 16 != 0 || p.mask.block_cols % 16 != 0) {
    return "jax_flash: block_size: expected multiples of 16";
  }
  return with_coarse_head_dim(p, [&]<int kHeadDim>() -> const char* {
    switch (p.dtype) {
      case DType::kBF16:
        return launch_16_bit<__nv_bfloat16, kHeadDim>(p, stream);
      case DType::kF16:
        return launch_16_bit<__half, kHeadDim>(p, stream);
      case DType::kF32:
        return backward_f32<kHeadDim>(p, stream);
    }
    return "jax_flash: dtype: expected float32, float16 or bfloat16";
  });
}

}  // namespace jax_flash::attention
