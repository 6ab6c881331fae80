// XLA handlers of the products with GELU on CUDA: buffers -> params -> launch.h.
#include "common/cuda_handler.h"
#include "dense/check.h"
#include "dense/launch.h"

namespace jax_flash::dense {
namespace {

// operands: x, weight, bias; results: out, pre, workspace
ffi::Error forward(cudaStream_t stream, const CallFrame& call) {
  Params params;
  JAX_FLASH_RETURN_IF_ERROR(decode_forward(call, params));
  return to_error(launch_product(params, stream));
}

// operands: dout, weight, pre; results: dpre, workspace
ffi::Error backward(cudaStream_t stream, const CallFrame& call) {
  Params params;
  JAX_FLASH_RETURN_IF_ERROR(decode_backward(call, params));
  return to_error(launch_product(params, stream));
}

JAX_FLASH_CUDA_HANDLER(forward, "jax_flash.dense_gelu_forward", 3, 3);
JAX_FLASH_CUDA_HANDLER(backward, "jax_flash.dense_gelu_backward", 3, 2);

}  // namespace
}  // namespace jax_flash::dense
