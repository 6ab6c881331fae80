#pragma once

#include "ptx/sm90.cuh"

namespace jax_flash::norm {

// Of a programmatic dependent: until the stream's kernel before it is over, and what it wrote is
// there.
struct PriorGrid {
  static constexpr bool kWaits = true;
  __device__ __forceinline__ static void wait() { ptx::wait_for_prior_grid(); }
};

}  // namespace jax_flash::norm
