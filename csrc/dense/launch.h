// The border between the handlers and cuBLASLt.
#pragma once

#include <cuda_runtime_api.h>

#include "dense/params.h"

namespace jax_flash::dense {

// Enqueues the product on `stream`; never allocates, never synchronises. Returns nullptr, or a
// message that lives forever. No size may be 0.
const char* launch_product(const Params& params, cudaStream_t stream);

}  // namespace jax_flash::dense
