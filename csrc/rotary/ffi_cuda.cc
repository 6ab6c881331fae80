// XLA handler of the rotary embedding on CUDA: buffers -> params -> launch.h.
#include "common/cuda_handler.h"
#include "rotary/check.h"
#include "rotary/launch.h"

namespace jax_flash::rotary {
namespace {

// operands: x, cos, sin, cos_k, sin_k, positions; results: x, turned
ffi::Error rotary(cudaStream_t stream, const CallFrame& call) {
  Params params;
  JAX_FLASH_RETURN_IF_ERROR(decode(call, params));
  return to_error(launch(params, stream));
}

// operands: queries, keys, cos, sin, cos_k, sin_k, positions; results: queries, keys
ffi::Error rotary_pair(cudaStream_t stream, const CallFrame& call) {
  Params params;
  JAX_FLASH_RETURN_IF_ERROR(decode_pair(call, params));
  return to_error(launch(params, stream));
}

JAX_FLASH_CUDA_HANDLER(rotary, "jax_flash.rotary", 6, 1);
JAX_FLASH_CUDA_HANDLER(rotary_pair, "jax_flash.rotary_pair", 7, 2);

}  // namespace
}  // namespace jax_flash::rotary
