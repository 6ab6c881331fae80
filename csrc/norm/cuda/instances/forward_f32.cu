#include "norm/cuda/forward.cuh"

namespace jax_flash::norm {

template const char* forward<float>(const ForwardParams&, const Plan&, cudaStream_t);

}  // namespace jax_flash::norm
