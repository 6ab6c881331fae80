#include "attention/cuda/sm80/backward_launch.cuh"

namespace jax_flash::attention {

template <>
const char* backward_sm80<__nv_bfloat16, 64>(const BackwardParams& params, cudaStream_t stream) {
  return sm80::choose_backward<__nv_bfloat16, 64>(params, stream);
}

}  // namespace jax_flash::attention
