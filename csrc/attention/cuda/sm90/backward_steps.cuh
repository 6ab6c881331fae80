// The steps of a place in the Hopper backward, for those who bring operands and those who make dQ.
#pragma once

#include "attention/cuda/sm90/backward_arguments.h"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

// A walk over the steps of a place: the query tiles of a head, head after head.
struct StepWalk {
  int head, query_tile;

  __device__ __forceinline__ explicit StepWalk(const KeyTilePlace& place)
      : head(place.first_head), query_tile(place.first_tile) {}
  __device__ __forceinline__ void advance(const KeyTilePlace& place) {
    if (++query_tile == place.range.end) {
      query_tile = place.range.begin;
      ++head;
    }
  }
  // The number of the query tile, and so of its sum of dQ and its stats, among all.
  __device__ __forceinline__ int sum(const BackwardArguments& a, const KeyTilePlace& place) const {
    return place.query_tile + head * static_cast<int>(a.plan.query_slots) + query_tile;
  }
};

// Issues dQ = dS K of 64 queries x 64 dims and kKeys keys, or, where kAdds, dQ += dS K. `scores`
// and `keys` point to the first key of dS^T and K.
template <typename Element, int kKeys, bool kAdds>
__device__ __forceinline__ void multiply_scores(float (&rDQ)[8][4], ptx::MatrixDescriptor scores,
                                                ptx::MatrixDescriptor keys) {
  ptx::wgmma_pin(rDQ);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    ptx::wgmma<Element, true, true>(rDQ, scores + k * ptx::kRows16, keys + k * ptx::kRows16,
                                    kAdds || k > 0);
  }
  ptx::wgmma_commit();
}

}  // namespace jax_flash::attention::sm90
