// The width of the rows -> a forward kernel.
#pragma once

#include "softmax/cuda/forward.cuh"
#include "softmax/cuda/instances.h"
#include "softmax/cuda/plan.h"

namespace jax_flash::softmax {

template <typename Element>
const char* forward(const ForwardParams& p, cudaStream_t stream) {
  const device::Places places(p.batch_shape, p.seq_q);
  choose(p, [&]<int kThreads, int kVectors>() {
    using T = Team<kThreads>;
    if constexpr (kVectors == 0) {
      long_forward_kernel<Element, kThreads, 2><<<blocks(p, 1), kThreads, 0, stream>>>(p, places);
    } else {
      const auto run = [&]<bool kWhole>() {
        forward_kernel<Element, kThreads, kVectors, kWhole>
            <<<blocks(p, T::kRows), T::kBlock, 0, stream>>>(p, places);
      };
      is_whole(p, p.mask.data) ? run.template operator()<true>() : run.template operator()<false>();
    }
  });
  return last_error();
}

}  // namespace jax_flash::softmax
