// XLA handlers of attention on the CPU: buffers -> params -> cpu/.
#include "attention/check.h"
#include "attention/cpu/schedule.h"

namespace jax_flash::attention {
namespace {

ffi::Error forward(ffi::ThreadPool pool, const CallFrame& call) {
  ForwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_forward(call, params));
  return cpu::run_forward(params, pool);
}

ffi::Error backward(ffi::ThreadPool pool, const CallFrame& call) {
  BackwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_backward(call, params));
  return cpu::run_backward(params, pool);
}

JAX_FLASH_HANDLER(forward, "jax_flash.attention_forward", 9, 2, ffi::ThreadPool, {});
JAX_FLASH_HANDLER(backward, "jax_flash.attention_backward", 13, 4, ffi::ThreadPool, {});

}  // namespace
}  // namespace jax_flash::attention
