#include "norm/cuda/forward.cuh"
#include "norm/cuda/forward_common.cuh"

namespace jax_flash::norm {

template const char* forward_common<__half, Nothing>(const ForwardParams&, const Layout&,
                                                     cudaStream_t);
template const char* forward<__half>(const ForwardParams&, const Plan&, cudaStream_t);

}  // namespace jax_flash::norm
