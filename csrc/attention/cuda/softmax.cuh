// The online softmax over the tiles of S that a warp sees, in base 2:
//   m = reference of the row,   l = sum over j of 2^(scale_log2 s_j - m),   O = sum of the same
//   times v_j
// The reference is an old maximum: it moves only when some row of the warp passes it by more than
// 2^kSlack, so that the shuffles and the rescaling of O are a rare branch. Any reference gives the
// same P / l; this one keeps P below 256, far from the limits of bf16, fp16 and the f32 sums.
#pragma once

#include <cfloat>
#include <cmath>

#include "device/warp.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::attention {

template <int kM>  // 16-row fragments of the warp; a lane holds rows g and g + 8 of each
class OnlineSoftmax {
 public:
  static constexpr float kSlack = 8.0f;

  __device__ OnlineSoftmax(float scale_log2) : scale_log2_(scale_log2) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      max_log2_[m][0] = max_log2_[m][1] = -FLT_MAX;  // NOTE: finite, so that no row is special
      sum_[m][0] = sum_[m][1] = 0.0f;
    }
  }

  // S -> P in place (unnormalised, not yet rounded); rescales O where the reference moved.
  template <int kN, int kD>
  __device__ __forceinline__ void update(float (&rS)[kM][kN][4], float (&rO)[kM][kD][4]) {
    float tile_max[kM][2];
    bool moves = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& highest = tile_max[m][half];
        highest = fmaxf(rS[m][0][2 * half], rS[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kN; ++n) {
          highest = fmaxf(highest, fmaxf(rS[m][n][2 * half], rS[m][n][2 * half + 1]));
        }
        moves |= fmaf(highest, scale_log2_, -max_log2_[m][half]) > kSlack;
      }
    }
    if (__any_sync(device::kWarp, moves)) move_reference(tile_max, rO);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& score = rS[m][n][e];
          score = ptx::exp2_approx(fmaf(score, scale_log2_, -max_log2_[m][e / 2]));
          sum_[m][e / 2] += score;
        }
      }
    }
  }

  // Once, after the last tile: adds up the lanes that share a row.
  __device__ void finish() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      sum_[m][0] = device::quad_sum(sum_[m][0]);
      sum_[m][1] = device::quad_sum(sum_[m][1]);
    }
  }
  // 1 / l, or 0 for a row that saw no key.
  __device__ float normalizer(int m, int half) const {
    return sum_[m][half] == 0.0f ? 0.0f : __fdividef(1.0f, sum_[m][half]);
  }
  // log sum exp (natural), or -inf for a row that saw no key.
  __device__ float lse(int m, int half) const {
    constexpr float kLn2 = 0.693147180559945309f;
    return sum_[m][half] == 0.0f ? -INFINITY : (max_log2_[m][half] + __log2f(sum_[m][half])) * kLn2;
  }

 private:
  template <int kD>
  __device__ __forceinline__ void move_reference(const float (&tile_max)[kM][2],
                                                 float (&rO)[kM][kD][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old = max_log2_[m][half];
        max_log2_[m][half] = fmaxf(old, device::quad_max(tile_max[m][half]) * scale_log2_);
        const float alpha = ptx::exp2_approx(old - max_log2_[m][half]);
        sum_[m][half] *= alpha;
#pragma unroll
        for (int d = 0; d < kD; ++d) {
          rO[m][d][2 * half] *= alpha;
          rO[m][d][2 * half + 1] *= alpha;
        }
      }
    }
  }

  float scale_log2_;
  float max_log2_[kM][2], sum_[kM][2];
};

}  // namespace jax_flash::attention
