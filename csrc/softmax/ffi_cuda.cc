// XLA handlers of the softmax on CUDA: buffers -> params -> launch.h.
#include "common/cuda_handler.h"
#include "softmax/check.h"
#include "softmax/launch.h"

namespace jax_flash::softmax {
namespace {

ffi::Error forward(cudaStream_t stream, const CallFrame& call) {
  ForwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_forward(call, params));
  return to_error(launch_forward(params, stream));
}

ffi::Error backward(cudaStream_t stream, const CallFrame& call) {
  BackwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_backward(call, params));
  return to_error(launch_backward(params, stream));
}

JAX_FLASH_CUDA_HANDLER(forward, "jax_flash.softmax_forward", 3, 1);
JAX_FLASH_CUDA_HANDLER(backward, "jax_flash.softmax_backward", 3, 1);

}  // namespace
}  // namespace jax_flash::softmax
