// The border between the handlers and the CUDA kernels: neither side sees the other's headers.
#pragma once

#include <cuda_runtime_api.h>

#include "cross_entropy/params.h"

namespace jax_flash::cross_entropy {

// Enqueue everything on `stream`; never allocate, never synchronise. Return nullptr, or a message
// that lives forever. No size may be 0 but rows.
const char* launch_forward(const ForwardParams& params, cudaStream_t stream);
const char* launch_backward(const BackwardParams& params, cudaStream_t stream);
// Both, of the same logits.
const char* launch_gradients(const ForwardParams& forward, const BackwardParams& backward,
                             cudaStream_t stream);

}  // namespace jax_flash::cross_entropy
