#include "attention/cuda/sm90/forward_launch.cuh"

namespace jax_flash::attention {

template const char* forward_sm90<__nv_bfloat16, 64, 64>(const ForwardParams&, cudaStream_t);

}  // namespace jax_flash::attention
