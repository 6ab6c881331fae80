#include "softmax/cuda/forward_launch.cuh"

namespace jax_flash::softmax {

template const char* forward<__nv_bfloat16>(const ForwardParams&, cudaStream_t);

}  // namespace jax_flash::softmax
