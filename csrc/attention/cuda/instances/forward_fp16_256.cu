#include "attention/cuda/sm80/forward.cuh"

namespace jax_flash::attention {

template const char* forward_sm80<__half, 256>(const ForwardParams&, cudaStream_t);

}  // namespace jax_flash::attention
