// XLA handler of the rotary embedding on CUDA: buffers -> params -> launch.h.
#include "common/cuda_handler.h"
#include "rotary/check.h"
#include "rotary/launch.h"

namespace jax_flash::rotary {
namespace {

ffi::Error rotary(cudaStream_t stream, const CallFrame& call) {
  Params params;
  JAX_FLASH_RETURN_IF_ERROR(decode(call, params));
  return to_error(launch(params, stream));
}

JAX_FLASH_CUDA_HANDLER(rotary, "jax_flash.rotary", 6, 1);

}  // namespace
}  // namespace jax_flash::rotary
