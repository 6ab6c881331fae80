// One attention call -> tasks on XLA's thread pool.
#pragma once

#include "attention/params.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flash::attention::cpu {

xla::ffi::Error run_forward(const ForwardParams& p, xla::ffi::ThreadPool& pool);
xla::ffi::Error run_backward(const BackwardParams& p, xla::ffi::ThreadPool& pool);

}  // namespace jax_flash::attention::cpu
