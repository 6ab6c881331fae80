#include "softmax/cuda/backward_launch.cuh"

namespace jax_flash::softmax {

template const char* backward<__nv_bfloat16>(const BackwardParams&, cudaStream_t);

}  // namespace jax_flash::softmax
