// Run-time dtypes -> the backward kernel, once.
#include "cross_entropy/cuda/backward.cuh"

#include "cross_entropy/cuda/shape.h"
#include "cross_entropy/launch.h"

namespace jax_flash::cross_entropy {
namespace {

constexpr int kThreads = 512, kBlocks = 2, kUnroll = 4;

template <typename Element, typename Result>
void launch(const BackwardParams& p, cudaStream_t stream) {
  const LaunchShape shape = launch_shape(p, kUnroll, kThreads);
  backward_kernel<Element, Result, kUnroll, kThreads, kBlocks>
      <<<shape.blocks, shape.threads, 0, stream>>>(p);
}

}  // namespace

const char* launch_backward(const BackwardParams& p, cudaStream_t stream) {
  if (p.rows == 0) return nullptr;
  device::visit(p.result, [&]<typename Result>() {
    p.dtype == p.result ? launch<Result, Result>(p, stream) : launch<float, Result>(p, stream);
  });
  return last_error();
}

}  // namespace jax_flash::cross_entropy
