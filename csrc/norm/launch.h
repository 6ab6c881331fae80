// The border between the handlers and the CUDA kernels: neither side sees the other's headers.
#pragma once

#include <cuda_runtime_api.h>

#include "norm/params.h"

namespace jax_flash::norm {

// Enqueue everything on `stream`; never allocate, never synchronise. Return nullptr, or a message
// that lives forever. Entries, rows and width may not be 0; compact rows may.
const char* launch_norm_forward(const ForwardParams& params, cudaStream_t stream);
const char* launch_norm_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace jax_flash::norm
