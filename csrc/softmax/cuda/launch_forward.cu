// Run-time types and widths -> the forward kernels of one type each (instances/).
#include "device/vector.cuh"
#include "softmax/cuda/instances.h"
#include "softmax/launch.h"

namespace jax_flash::softmax {

const char* launch_forward(const ForwardParams& params, cudaStream_t stream) {
  return device::visit(params.dtype,
                       [&]<typename Element>() { return forward<Element>(params, stream); });
}

}  // namespace jax_flash::softmax
