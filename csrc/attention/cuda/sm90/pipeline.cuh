// Where one side of a ring of stages in shared memory stands, and how it gives a stage back.
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

// What lanes have read by loads of their own, each of them gives back, kWarpLanes arrivals a warp.
// NOTE: one after __syncwarp would do, but racecheck only counts what the arriving thread itself
// has read. It costs nothing: within 1% of one arrival a warp (H200, 2026-11-28).
inline constexpr uint32_t kWarpLanes = 32;
__device__ __forceinline__ void release_read(ptx::Mbarrier& barrier) {
  ptx::mbarrier_arrive(barrier);
}

}  // namespace jax_flash::attention::sm90
