// The border between the handler and the CUDA kernels: neither side sees the other's headers.
#pragma once

#include <cuda_runtime_api.h>

#include "rotary/params.h"

namespace jax_flash::rotary {

// Enqueues on `stream`; never allocates, never synchronises. Returns nullptr, or a message that
// lives forever. No size may be 0.
const char* launch(const Params& params, cudaStream_t stream);

}  // namespace jax_flash::rotary
