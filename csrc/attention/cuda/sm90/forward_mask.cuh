// The tiles of the Hopper forward that are not plain: the first of a job, which has no reference
// yet, and those that a mask or the end of the keys cuts. S -> P by a guess or by the maximum,
// looking at no more elements than the tile's View asks for. Called by the consumers
// (forward_consumer.cuh).
#pragma once

#include "attention/cuda/mask.cuh"
#include "attention/cuda/sm90/forward_traits.cuh"
#include "attention/cuda/sm90/softmax.cuh"
#include "device/opaque.cuh"
#include "device/warp.cuh"

namespace jax_flash::attention::sm90 {

// Those of a job, as the warps of a warpgroup see them. NOTE: what a way needs of the job and the
// arguments is read there, not ahead of the branches: hence the references.
template <typename Traits>
class UnusualTiles {
 public:
  using Softmax = RowSoftmax<typename Traits::Element>;
  using Scores = float[1][Traits::kFragmentsN][4];

  __device__ __forceinline__ UnusualTiles(const ForwardArguments& a,
                                          const typename Traits::Smem& smem, uint32_t job,
                                          int warpgroup)
      : a_(a), smem_(smem), job_(job), warpgroup_(warpgroup) {}

  // S -> P by a guess, where the tile is the first of its job; true if it was good.
  __device__ __forceinline__ bool guess(Step step, Softmax& softmax, Scores& rS) const {
    if (step.view(warpgroup_) == View::kAll) return softmax.try_first(rS[0], a_.scale_log2);
    if constexpr (Traits::kHasRoom) {
      return softmax.try_first_diagonal(rS[0], full_blocks(step), a_.scale_log2);
    } else {
      // The last column that counts for this lane's upper row, as far as the mask's right edge and
      // as far as keys go.
      const int col = first_col(step);
      const int diagonal = first_row() + device::opaque_lane() / 4 + job().s.right - col;
      const int last = job().s.key_length - 1 - col;
      return softmax.try_first_edge(rS[0], diagonal, last, device::opaque_lane() % 4 * 2,
                                    a_.scale_log2);
    }
  }

  // S -> P by the maximum; did a reference move?
  __device__ __forceinline__ bool update(Step step, Softmax& softmax, Scores& rS,
                                         float (&alpha)[2]) const {
    if constexpr (Traits::kHasRoom) {
      if (step.view(warpgroup_) == View::kEdge) {
        return softmax.update_diagonal(rS[0], full_blocks(step), a_.scale_log2, alpha);
      }
    }
    if (step.view(warpgroup_) != View::kAll) {
      mask_scores(rS, job().s, job().blocks, first_row(), first_col(step));
    }
    return softmax.template update<false>(rS[0], a_.scale_log2, alpha);
  }

 private:
  __device__ const typename Traits::Job& job() const { return smem_.job[job_ % Traits::kJobs]; }
  // The warp's first row and the tile's first column, from the sequence's start.
  __device__ __forceinline__ int first_row() const {
    return job().s.first_row + row_of_warp(warpgroup_);
  }
  __device__ __forceinline__ int first_col(Step step) const {
    return step.tile() * Traits::kBlockN;
  }
  // How many of the tile's blocks of 16 columns, where it ends on a diagonal of them, count whole.
  __device__ __forceinline__ int full_blocks(Step step) const {
    return device::uniform((first_row() + job().s.right - first_col(step)) >> 4);
  }

  const ForwardArguments& a_;
  const typename Traits::Smem& smem_;
  const uint32_t job_;
  const int warpgroup_;
};

}  // namespace jax_flash::attention::sm90
