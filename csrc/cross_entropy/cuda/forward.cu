// Run-time dtype -> the forward kernel, once.
#include "cross_entropy/cuda/forward.cuh"

#include "cross_entropy/cuda/shape.h"
#include "cross_entropy/launch.h"

namespace jax_flash::cross_entropy {
namespace {

constexpr int kThreads = 512, kBlocks = 2, kUnroll = 4;

template <typename Element, bool kTotal>
void launch(const ForwardParams& p, cudaStream_t stream) {
  const LaunchShape shape = launch_shape(p, kUnroll, kThreads);
  forward_kernel<Element, kTotal, kUnroll, kThreads, kBlocks>
      <<<shape.blocks, shape.threads, 0, stream>>>(p);
}

}  // namespace

const char* launch_forward(const ForwardParams& p, cudaStream_t stream) {
  if (p.rows == 0) return nullptr;
  device::visit(p.dtype, [&]<typename Element>() {
    p.total == nullptr ? launch<Element, false>(p, stream) : launch<Element, true>(p, stream);
  });
  return last_error();
}

}  // namespace jax_flash::cross_entropy
