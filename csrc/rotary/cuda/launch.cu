// Run-time types and forms -> the kernels.
#include <cuda_runtime_api.h>

#include "rotary/cuda/rotary.cuh"
#include "rotary/launch.h"

namespace jax_flash::rotary {
namespace {

template <typename Pairs>
void run(const Params& p, cudaStream_t stream) {
  const Plan plan = Plan::make<Pairs>(p);
  const uint32_t blocks = plan.shares[0].blocks + plan.shares[1].blocks;
  rotary_kernel<Pairs><<<blocks, plan.threads, 0, stream>>>(p, plan);
}

template <typename Pairs, typename Otherwise>
void run_if_aligned(const Params& p, cudaStream_t stream) {
  is_aligned<Pairs>(p) ? run<Pairs>(p, stream) : run<Otherwise>(p, stream);
}

}  // namespace

const char* launch(const Params& p, cudaStream_t stream) {
  device::visit(p.dtype, [&]<typename Element>() {
    if (p.is_interleaved) {
      run_if_aligned<Interleaved<Element>, One<Element, true>>(p, stream);
    } else {
      run_if_aligned<Half<Element>, One<Element, false>>(p, stream);
    }
  });
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_flash::rotary
