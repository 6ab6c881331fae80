// One source file an element type and direction (instances/), so that they compile in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include "softmax/params.h"

namespace jax_flash::softmax {

template <typename Element>
const char* forward(const ForwardParams& params, cudaStream_t stream);
template <typename Element>
const char* backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace jax_flash::softmax
