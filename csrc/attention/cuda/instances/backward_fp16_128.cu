#include "attention/cuda/sm80/backward_launch.cuh"

namespace jax_flash::attention {

template <>
const char* backward_sm80<__half, 128>(const BackwardParams& params, cudaStream_t stream) {
  return sm80::choose_backward<__half, 128>(params, stream);
}

}  // namespace jax_flash::attention
