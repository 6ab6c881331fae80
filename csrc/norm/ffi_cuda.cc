// XLA handlers of the norms on CUDA: buffers -> params -> launch.h.
#include "common/cuda_handler.h"
#include "norm/check.h"
#include "norm/launch.h"

namespace jax_flash::norm {
namespace {

ffi::Error forward(cudaStream_t stream, const CallFrame& call) {
  ForwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_forward(call, params));
  return to_error(launch_norm_forward(params, stream));
}

ffi::Error backward(cudaStream_t stream, const CallFrame& call) {
  BackwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_backward(call, params));
  return to_error(launch_norm_backward(params, stream));
}

JAX_FLASH_CUDA_HANDLER(forward, "jax_flash.norm_forward", 13, 8);
JAX_FLASH_CUDA_HANDLER(backward, "jax_flash.norm_backward", 15, 10);

}  // namespace
}  // namespace jax_flash::norm
