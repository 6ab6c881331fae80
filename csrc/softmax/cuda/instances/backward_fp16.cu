#include "softmax/cuda/backward_launch.cuh"

namespace jax_flash::softmax {

template const char* backward<__half>(const BackwardParams&, cudaStream_t);

}  // namespace jax_flash::softmax
