#include "norm/cuda/forward.cuh"

namespace jax_flash::norm {

template const char* forward<__nv_bfloat16>(const ForwardParams&, const Plan&, cudaStream_t);

}  // namespace jax_flash::norm
