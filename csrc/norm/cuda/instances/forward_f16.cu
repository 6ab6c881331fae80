#include "norm/cuda/forward.cuh"

namespace jax_flash::norm {

template const char* forward<__half>(const ForwardParams&, const Plan&, cudaStream_t);

}  // namespace jax_flash::norm
