// Run-time types and forms -> the kernels.
#include <cuda_runtime_api.h>

#include "rotary/cuda/rotary.cuh"
#include "rotary/launch.h"

namespace jax_flash::rotary {
namespace {

template <typename Element, bool kInterleaved, bool kAligned>
void run(const Params& p, cudaStream_t stream) {
  constexpr int kCount = Pairs<Element, kInterleaved, kAligned>::kCount;
  constexpr int kUnroll = kHeadsAtOnce<kInterleaved, kAligned>;
  const Plan plan = make_plan(p, p.pairs / kCount, kUnroll);
  const int64_t blocks = (plan.rows + plan.rows_of_block - 1) / plan.rows_of_block;
  const dim3 grid(static_cast<unsigned>(blocks), p.kinds);
  const unsigned threads = plan.by_row.value * plan.rows_of_block;
  rotary_kernel<Element, kInterleaved, kAligned><<<grid, threads, 0, stream>>>(p, plan);
}

}  // namespace

const char* launch(const Params& p, cudaStream_t stream) {
  device::visit(p.dtype, [&]<typename Element>() {
    const bool aligned = is_aligned(p, 16 / sizeof(Element));
    if (p.is_interleaved) {
      aligned ? run<Element, true, true>(p, stream) : run<Element, true, false>(p, stream);
    } else {
      aligned ? run<Element, false, true>(p, stream) : run<Element, false, false>(p, stream);
    }
  });
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_flash::rotary
