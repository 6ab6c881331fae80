#include "norm/cuda/backward.cuh"
#include "norm/cuda/backward_common.cuh"

namespace jax_flash::norm {

template const char* backward_common<__nv_bfloat16, Nothing>(const BackwardParams&, const Layout&,
                                                             cudaStream_t);
template const char* backward<__nv_bfloat16>(const BackwardParams&, const Plan&, cudaStream_t);

}  // namespace jax_flash::norm
