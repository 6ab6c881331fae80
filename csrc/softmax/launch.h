// The border between the handlers and the CUDA kernels: neither side sees the other's headers.
#pragma once

#include <cuda_runtime_api.h>

#include "softmax/params.h"

namespace jax_flash::softmax {

// Enqueue on `stream`; never allocate, never synchronise. Return nullptr, or a message that lives
// forever. No size may be 0.
const char* launch_forward(const ForwardParams& params, cudaStream_t stream);
const char* launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace jax_flash::softmax
