// The width of the rows -> a backward kernel.
#pragma once

#include "softmax/cuda/backward.cuh"
#include "softmax/cuda/instances.h"
#include "softmax/cuda/plan.h"

namespace jax_flash::softmax {

template <typename Element>
const char* backward(const BackwardParams& p, cudaStream_t stream) {
  const device::Places places(p.batch_shape, p.seq_q);
  choose(p, [&]<int kThreads, int kVectors>() {
    using T = Team<kThreads>;
    if constexpr (kVectors == 0) {
      long_backward_kernel<Element, kThreads, 2><<<blocks(p, 1), kThreads, 0, stream>>>(p, places);
    } else {
      const auto run = [&]<bool kWhole>() {
        backward_kernel<Element, kThreads, kVectors, kWhole>
            <<<blocks(p, T::kRows), T::kBlock, 0, stream>>>(p, places);
      };
      is_whole(p, nullptr) ? run.template operator()<true>() : run.template operator()<false>();
    }
  });
  return last_error();
}

}  // namespace jax_flash::softmax
