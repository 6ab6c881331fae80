// Handlers on CUDA: they only enqueue on XLA's stream, never allocate, never synchronise, so that
// XLA may record them into a command buffer (CUDA graph).
#pragma once

#include <cuda_runtime_api.h>

#include "common/handler.h"

#define JAX_FLASH_CUDA_HANDLER(function, target, num_operands, num_results) \
  JAX_FLASH_HANDLER(function, target, num_operands, num_results,            \
                    xla::ffi::PlatformStream<cudaStream_t>,                 \
                    {xla::ffi::Traits::kCmdBufferCompatible})
