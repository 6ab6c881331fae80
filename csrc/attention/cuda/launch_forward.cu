// Run-time dtype and head dim -> the forward kernel, once.
#include "attention/cuda/architecture.h"
#include "attention/cuda/instances.h"

namespace jax_flash::attention {
namespace {

template <typename Element>
const char* forward_16_bit(const ForwardParams& p, cudaStream_t stream) {
  if (runs_sm90_kernels()) {
    const char* status = with_head_dim(p, [&]<int kHeadDim>() {
      if constexpr (kHeadDim == 192) {
        if (p.value_dim <= 128) return forward_sm90<Element, 192, 128>(p, stream);
      }
      constexpr int kDim = kHeadDim < 64 ? 64 : kHeadDim;
      return forward_sm90<Element, kDim, kDim>(p, stream);
    });
    if (status != kNotCovered) return status;
  }
  return with_head_dim(p,
                       [&]<int kHeadDim>() { return forward_sm80<Element, kHeadDim>(p, stream); });
}

}  // namespace

const char* launch_attention_forward(const ForwardParams& p, cudaStream_t stream) {
  if (p.mask.block_rows % 16 != 0 || p.mask.block_cols % 16 != 0) {
    return "jax_flash: block_size: expected multiples of 16";
  }
  switch (p.dtype) {
    case DType::kF32:
      return with_coarse_head_dim(p,
                                  [&]<int kHeadDim>() { return forward_f32<kHeadDim>(p, stream); });
    case DType::kBF16:
      return forward_16_bit<__nv_bfloat16>(p, stream);
    case DType::kF16:
      return forward_16_bit<__half>(p, stream);
  }
  return "jax_flash: dtype: expected float32, float16 or bfloat16";
}

}  // namespace jax_flash::attention
