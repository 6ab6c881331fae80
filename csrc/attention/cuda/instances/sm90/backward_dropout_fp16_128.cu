#include "attention/cuda/sm90/backward_launch.cuh"

namespace jax_flash::attention {

template <>
const char* backward_sm90<__half, 128, true>(const BackwardParams& params, cudaStream_t stream) {
  return sm90::choose_backward<__half, 128, true>(params, stream);
}

}  // namespace jax_flash::attention
