// Where one side of a ring of stages in shared memory stands.
#pragma once

#include "ptx/sm90.cuh"

namespace jax_flash::attention::sm90 {

// The stage of the count-th message, and the parity of the mbarrier phase that its consumer waits
// for on `full`; the producer waits for the other parity on `empty`.
template <int kStages>
struct Place {
  int stage;
  uint32_t parity;

  __device__ __forceinline__ explicit Place(uint32_t count)
      : stage(count % kStages), parity(count / kStages & 1) {}
};

}  // namespace jax_flash::attention::sm90
