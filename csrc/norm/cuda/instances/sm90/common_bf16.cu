#include "norm/cuda/backward_common.cuh"
#include "norm/cuda/forward_common.cuh"
#include "norm/cuda/instances/sm90/prior_grid.cuh"

namespace jax_flash::norm {

template const char* forward_common<__nv_bfloat16, PriorGrid>(const ForwardParams&, const Layout&,
                                                              cudaStream_t);
template const char* backward_common<__nv_bfloat16, PriorGrid>(const BackwardParams&, const Layout&,
                                                               cudaStream_t);

}  // namespace jax_flash::norm
