// XLA handlers of attention on CUDA: buffers -> params -> launch.h.
#include "attention/check.h"
#include "attention/launch.h"
#include "common/cuda_handler.h"

namespace jax_flash::attention {
namespace {

ffi::Error forward(cudaStream_t stream, const CallFrame& call) {
  ForwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_forward(call, params));
  return to_error(launch_attention_forward(params, stream));
}

ffi::Error backward(cudaStream_t stream, const CallFrame& call) {
  BackwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_backward(call, params));
  return to_error(launch_attention_backward(params, stream));
}

JAX_FLASH_CUDA_HANDLER(forward, "jax_flash.attention_forward", 9, 2);
JAX_FLASH_CUDA_HANDLER(backward, "jax_flash.attention_backward", 13, 4);

}  // namespace
}  // namespace jax_flash::attention
