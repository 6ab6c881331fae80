#include "norm/cuda/backward.cuh"

namespace jax_flash::norm {

template const char* backward<__nv_bfloat16>(const BackwardParams&, const Plan&, cudaStream_t);

}  // namespace jax_flash::norm
