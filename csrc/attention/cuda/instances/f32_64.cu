#include "attention/cuda/f32/backward.cuh"
#include "attention/cuda/f32/forward.cuh"

namespace jax_flash::attention {

template <>
const char* forward_f32<64>(const ForwardParams& params, cudaStream_t stream) {
  return f32::launch_forward<64>(params, stream);
}

template <>
const char* backward_f32<64>(const BackwardParams& params, cudaStream_t stream) {
  return f32::launch_backward<64>(params, stream);
}

}  // namespace jax_flash::attention
