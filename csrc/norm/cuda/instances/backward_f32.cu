#include "norm/cuda/backward.cuh"
#include "norm/cuda/backward_common.cuh"

namespace jax_flash::norm {

template const char* backward_common<float, Nothing>(const BackwardParams&, const Layout&,
                                                     cudaStream_t);
template const char* backward<float>(const BackwardParams&, const Plan&, cudaStream_t);

}  // namespace jax_flash::norm
