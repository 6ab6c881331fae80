// XLA handlers of cross-entropy on CUDA: buffers -> params -> launch.h.
#include "common/cuda_handler.h"
#include "cross_entropy/check.h"
#include "cross_entropy/launch.h"

namespace jax_flash::cross_entropy {
namespace {

// operands: logits, labels; results: lse, label_logit, total
ffi::Error forward(cudaStream_t stream, const CallFrame& call) {
  ForwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_forward(call, params));
  return to_error(launch_forward(params, stream));
}

// operands: logits, labels, lse, dlse, dlabel, dtotal; results: dlogits
ffi::Error backward(cudaStream_t stream, const CallFrame& call) {
  BackwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_backward(call, params));
  return to_error(launch_backward(params, stream));
}

// operands: logits, labels, row_weights, first_row, the memory of dlogits or nothing;
// results: lse, label_logit, total, dlogits
ffi::Error gradients(cudaStream_t stream, const CallFrame& call) {
  ForwardParams forward;
  BackwardParams backward;
  JAX_FLASH_RETURN_IF_ERROR(decode_gradients(call, forward, backward));
  return to_error(launch_gradients(forward, backward, stream));
}

JAX_FLASH_CUDA_HANDLER(forward, "jax_flash.cross_entropy_forward", 2, 3);
JAX_FLASH_CUDA_HANDLER(backward, "jax_flash.cross_entropy_backward", 6, 1);
JAX_FLASH_CUDA_HANDLER(gradients, "jax_flash.cross_entropy_gradients", 5, 4);

}  // namespace
}  // namespace jax_flash::cross_entropy
