// What keeps the teams of the backward together.
#pragma once

#include "norm/cuda/layout.h"
#include "norm/cuda/team.cuh"

namespace jax_flash::norm {

// Holds back teams that lead the mean of all by more than half a unit: SMs do not get the memory
// evenly, and what the first ones gain the last ones lose (layout.h). The count is 0 when the grid
// starts; the sums' kernel puts it back. It changes when rows are read, and nothing else.
// NOTE: a hint. Two such grids at once share the count, so that who has waited in vain waits no
// more.
class Pace {
 public:
  __device__ explicit Pace(const Layout& layout)
      : count_(layout.units_done),
        units_(layout.ctas * layout.teams * static_cast<int>(gridDim.y)) {}

  // Before and after a unit: the team's first warp.
  __device__ __forceinline__ void wait(int turn) {
    constexpr int kPolls = 16;  // about a microsecond each
    if (count_ == nullptr || threadIdx.x % 32 != 0) return;
    const int wanted = turn * units_ - units_ / 2;
    for (int poll = 0; static_cast<int>(seen_) < wanted; ++poll) {
      if (poll == kPolls) {
        units_ = 0;  // counts on, but waits no more
        break;
      }
      seen_ = atomicAdd(count_, 0u);
    }
  }
  __device__ __forceinline__ void tell() {
    if (count_ != nullptr && threadIdx.x % 32 == 0) seen_ = atomicAdd(count_, 1u) + 1;
  }

 private:
  uint32_t* count_;
  int units_;
  uint32_t seen_ = 0;
};

}  // namespace jax_flash::norm
