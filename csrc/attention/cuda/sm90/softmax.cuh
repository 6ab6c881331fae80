// The online softmax of one warpgroup's 64 rows of S, in base 2:
//   m = reference of the row,   l = sum over j of 2^(scale_log2 s_j - m),   O = sum of the same
//   times v_j
// Any reference gives the same P / l. This one is an old maximum of the row, and moves only when it
// must: most tiles are taken at their word (try_update), without looking for a maximum at all; the
// sum that l needs anyway tells afterwards whether the reference was high enough. O is left to the
// caller, because wgmma still adds to it while the exponentials are taken.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "device/opaque.cuh"
#include "device/warp.cuh"
#include "ptx/sm80.cuh"

namespace jax_flash::attention::sm90 {

// A lane holds rows g and g + 8 of its warp's 16.
template <typename Element>
struct RowSoftmax {
  // The reference is kBias above the maximum when it moves, and P may grow to 2^kSlack. bf16 has
  // the range to keep P below 1, so that O overflows no sooner than with a maximum of every tile;
  // fp16 has not, and has values of V that need no such care.
  static constexpr bool kIsBf16 = std::is_same_v<Element, __nv_bfloat16>;
  static constexpr float kBias = kIsBf16 ? 16.0f : 0.0f, kSlack = kIsBf16 ? 0.0f : 8.0f;

  // The first tile of a job has no old reference. bf16 guesses one, and takes what comes of it
  // where no sum is too large, or so small that something may have vanished.
  static constexpr float kGuess = 24.0f, kLeast = 0x1p-40f;

  float reference[2];  // m; finite, so that no row is special
  float sum[2];        // this lane's share of l

  __device__ __forceinline__ void reset() {
    reference[0] = reference[1] = -FLT_MAX;
    sum[0] = sum[1] = 0.0f;
  }

  // S -> P in place (unnormalised, not yet rounded). False, for the whole warp, where some row grew
  // past its reference: then rS holds nothing of use, and nothing else has changed. `beside(i)` is
  // done when the exponentials of columns 16 i to 16 i + 15 are there, and gives the scale_log2 of
  // the next 16.
  template <int kN, typename Beside>
  __device__ __forceinline__ bool try_update(float (&rS)[kN][4], float scale_log2,
                                             const Beside& beside) {
    constexpr float kLimit = kIsBf16 ? 1.0f : 256.0f;  // 2^kSlack
    float tile_sum[2];
    exponentials(rS, scale_log2, tile_sum, beside);
    const bool is_good = tile_sum[0] <= kLimit && tile_sum[1] <= kLimit;  // NaN is not
    if (!__all_sync(device::kWarp, is_good)) return false;
    sum[0] += tile_sum[0];
    sum[1] += tile_sum[1];
    return true;
  }

  // The same for the first tile of a job.
  template <int kN>
  __device__ __forceinline__ bool try_first(float (&rS)[kN][4], float scale_log2) {
    reference[0] = reference[1] = kGuess;
    exponentials(rS, scale_log2, sum);
    return __all_sync(device::kWarp, is_good_first(0, true) && is_good_first(1, true));
  }
  // Of a tile whose rows see the columns up to `diagonal` (and one more for each row below this
  // lane's upper one), and up to `last`; the lane's columns are first_col, first_col + 1, + 8, ...
  template <int kN>
  __device__ __forceinline__ bool try_first_edge(float (&rS)[kN][4], int diagonal, int last,
                                                 int first_col, float scale_log2) {
    bool lane_sees[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int edge = min(diagonal + 8 * half, last);
      // A row that sees nothing must look for its maximum in the next tile.
      reference[half] = edge < 0 ? -FLT_MAX : kGuess;
      lane_sees[half] = edge >= first_col;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * n + e > edge - first_col) rS[n][2 * half + e] = -INFINITY;
        }
      }
    }
    exponentials(rS, scale_log2, sum);
    return __all_sync(device::kWarp,
                      is_good_first(0, lane_sees[0]) && is_good_first(1, lane_sees[1]));
  }
  template <int kN>
  __device__ __forceinline__ bool try_first_diagonal(float (&rS)[kN][4], int num_full,
                                                     float scale_log2) {
    reference[0] = reference[1] = kGuess;
    const Corner corner;
    diagonal_exponentials<true>(rS, corner, num_full, scale_log2);
    if (num_full < 0) reset();  // nothing was seen: the next tile must look for its maximum
    // Of a row of the corner block, a lane may see nothing.
    const bool sees[2] = {num_full > 0 || (num_full == 0 && corner.sees_first()), num_full >= 0};
    return __all_sync(device::kWarp, is_good_first(0, sees[0]) && is_good_first(1, sees[1]));
  }

  // The same for any S. kAlways: the references move to this tile's maximum, if it is higher, and
  // not only where they must. True, for the whole warp, where one moved: then O must be multiplied
  // by alpha.
  template <bool kAlways, int kN>
  __device__ __forceinline__ bool update(float (&rS)[kN][4], float scale_log2, float (&alpha)[2]) {
    float highest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float even = rS[0][2 * half], odd = rS[0][2 * half + 1];
#pragma unroll
      for (int n = 1; n < kN; ++n) {
        even = fmaxf(even, rS[n][2 * half]);
        odd = fmaxf(odd, rS[n][2 * half + 1]);
      }
      highest[half] = fmaxf(even, odd);
    }
    const bool any_moves = move_references<kAlways>(highest, scale_log2, alpha);
    float tile_sum[2];
    exponentials(rS, scale_log2, tile_sum);
    sum[0] += tile_sum[0];
    sum[1] += tile_sum[1];
    return any_moves;
  }

  // The same for a tile on the diagonal: of its blocks of 16 columns the warp sees the
  // first `num_full` whole, of the next one a triangle (with the diagonal), and of the others
  // nothing, so that nothing is computed there.
  template <int kN>
  __device__ __forceinline__ bool update_diagonal(float (&rS)[kN][4], int num_full,
                                                  float scale_log2, float (&alpha)[2]) {
    const Corner corner;
    float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int block = 0; block < kN / 2; ++block) {
      if (block <= num_full) {
        float (&left)[4] = rS[2 * block], (&right)[4] = rS[2 * block + 1];
        if (block == num_full) corner.mask(left, right);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          highest[half] = fmaxf(highest[half], fmaxf(fmaxf(left[2 * half], left[2 * half + 1]),
                                                     fmaxf(right[2 * half], right[2 * half + 1])));
        }
      }
    }
    const bool any_moves = move_references<false>(highest, scale_log2, alpha);
    diagonal_exponentials<false>(rS, corner, num_full, scale_log2);
    return any_moves;
  }

  // Once, after the last tile: adds up the lanes that share a row.
  __device__ __forceinline__ void finish() {
    sum[0] = device::quad_sum(sum[0]);
    sum[1] = device::quad_sum(sum[1]);
  }
  // 1 / l, or 0 for a row that saw no key.
  __device__ float normalizer(int half) const {
    return sum[half] == 0.0f ? 0.0f : __fdividef(1.0f, sum[half]);
  }
  // log sum exp (natural), or -inf for a row that saw no key.
  __device__ float lse(int half) const {
    constexpr float kLn2 = 0.693147180559945309f;
    return sum[half] == 0.0f ? -INFINITY : (reference[half] + __log2f(sum[half])) * kLn2;
  }

 private:
  // The block of 16 x 16 on the diagonal: a row sees the columns up to its own.
  class Corner {
   public:
    // NOTE: opaque, so that nothing of this is computed ahead of the main loop, and then spilled.
    __device__ __forceinline__ Corner() {
      const int lane = device::opaque_lane();
      row_ = lane / 4;
      col_ = lane % 4 * 2;
    }
    __device__ __forceinline__ bool sees_first() const { return col_ <= row_; }
    __device__ __forceinline__ void mask(float (&left)[4], float (&right)[4]) const {
      if (col_ > row_) left[0] = right[2] = -INFINITY;
      if (col_ + 1 > row_) left[1] = right[3] = -INFINITY;
      right[0] = right[1] = -INFINITY;
    }

   private:
    int row_, col_;
  };

  __device__ __forceinline__ bool is_good_first(int half, bool sees_something) const {
    return sum[half] <= 1.0f && (sum[half] >= kLeast || !sees_something);
  }

  // S -> P of the blocks up to `num_full`, which count, and zeros in the others.
  template <bool kMasks, int kN>
  __device__ __forceinline__ void diagonal_exponentials(float (&rS)[kN][4], const Corner& corner,
                                                        int num_full, float scale_log2) {
#pragma unroll
    for (int block = 0; block < kN / 2; ++block) {
      float (&left)[4] = rS[2 * block], (&right)[4] = rS[2 * block + 1];
      if (block <= num_full) {
        if (kMasks && block == num_full) corner.mask(left, right);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          left[e] = ptx::exp2_approx(fmaf(left[e], scale_log2, -reference[e / 2]));
          right[e] = ptx::exp2_approx(fmaf(right[e], scale_log2, -reference[e / 2]));
          sum[e / 2] += left[e] + right[e];
        }
      } else {
        // NOTE: opaque: constants in place of registers make the compiler move, and spill, all of
        // S.
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          left[e] = device::opaque_zero();
          right[e] = device::opaque_zero();
        }
      }
    }
  }

  // Moves the references of the warp's rows to these maxima of a tile, if one must move.
  template <bool kAlways>
  __device__ __forceinline__ bool move_references(const float (&highest)[2], float scale_log2,
                                                  float (&alpha)[2]) {
    const bool moves = fmaf(highest[0], scale_log2, -reference[0]) > kSlack ||
                       fmaf(highest[1], scale_log2, -reference[1]) > kSlack;
    const bool any_moves = kAlways || __any_sync(device::kWarp, moves);
    if (any_moves) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old = reference[half];
        reference[half] = fmaxf(old, fmaf(device::quad_max(highest[half]), scale_log2, kBias));
        alpha[half] = ptx::exp2_approx(old - reference[half]);
        sum[half] *= alpha[half];
      }
    }
    return any_moves;
  }

  template <int kN>
  __device__ __forceinline__ void exponentials(float (&rS)[kN][4], float scale_log2,
                                               float (&tile_sum)[2]) const {
    exponentials(rS, scale_log2, tile_sum, [scale_log2](int) { return scale_log2; });
  }
  template <int kN, typename Beside>
  __device__ __forceinline__ void exponentials(float (&rS)[kN][4], float scale_log2,
                                               float (&tile_sum)[2], const Beside& beside) const {
    tile_sum[0] = tile_sum[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        rS[n][e] = ptx::exp2_approx(fmaf(rS[n][e], scale_log2, -reference[e / 2]));
        tile_sum[e / 2] += rS[n][e];
      }
      if (n % 2 == 1) scale_log2 = beside(n / 2);
    }
  }
};

}  // namespace jax_flash::attention::sm90
