// Run-time types and widths -> the backward kernels of one type each (instances/).
#include "device/vector.cuh"
#include "softmax/cuda/instances.h"
#include "softmax/launch.h"

namespace jax_flash::softmax {

const char* launch_backward(const BackwardParams& params, cudaStream_t stream) {
  return device::visit(params.dtype,
                       [&]<typename Element>() { return backward<Element>(params, stream); });
}

}  // namespace jax_flash::softmax
