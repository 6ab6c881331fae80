// The forward: one pass over memory; a row stays in the registers of its team.
//
//   s = residual + dropout(x * rowscale * layerscale) [+ dropout(x1)],   kept rounded
//   z = (s - mean) * rsigma * weight + bias                              of s before it is rounded
//
// The variance comes from each warp's squares about the warp's own mean, joined across warps: one
// barrier a unit, and no cancellation. docs/kernels/norm.md has the schedule.
#pragma once

#include "device/opaque.cuh"
#include "norm/cuda/dropout.cuh"
#include "norm/cuda/instances.h"
#include "norm/cuda/rows.cuh"

namespace jax_flash::norm {

enum ForwardOperand { kX, kX1, kResidual };

// (mean, sum of squares about it) of one warp's columns of kRows rows, and of whole rows. Lane l
// has those of row l / (32 / kRows).
template <int kRows>
class Moments {
 public:
  static constexpr int kLanes = 32 / kRows;
  static constexpr int kParts = (kMaxThreads / 32 + kLanes - 1) / kLanes;  // of a lane

  __device__ Moments(const Team& team, int64_t width, int vectors, bool is_rms)
      : team_(team), width_(width), per_column_(1.0f / width), is_rms_(is_rms) {
    own_share_ = 1.0f / columns_of(team.warp, vectors);
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      columns_[k] = columns_of(team.lane % kLanes + kLanes * k, vectors);
    }
  }

  // Of s rounded to Kept.
  template <typename Kept, int kVectors>
  __device__ __forceinline__ float2 of_warp(const float (&s)[kRows][kVectors][kCols]) const {
    auto kept = [](float x) { return device::to_float(device::from_float<Kept>(x)); };
    float mean = 0.0f, means[kRows] = {}, sums[kRows];
    if (!is_rms_) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[r] = 0.0f;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float x[kCols];
#pragma unroll
          for (int i = 0; i < kCols; ++i) x[i] = kept(s[r][v][i]);
          sums[r] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        }
      }
      mean = device::warp_sums(sums) * own_share_;
#pragma unroll
      for (int r = 0; r < kRows; ++r) means[r] = __shfl_sync(kWarp, mean, r * kLanes);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int count = columns_left(width_, team_.column(v));
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          const float centred = kept(s[r][v][i]) - means[r];
          if (i < count) sums[r] += centred * centred;
        }
      }
    }
    return {mean, device::warp_sums(sums)};
  }

  // (mean, variance) of whole rows, from `parts` [warps][kRows].
  __device__ __forceinline__ float2 joined(const float2* parts) const {
    float2 part[kParts];
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const int warp = team_.lane % kLanes + kLanes * k;
      part[k] = {0.0f, 0.0f};
      if (warp >= team_.warps) continue;
      part[k] = parts[kRows * warp + team_.lane / kLanes];
      sum += part[k].x * columns_[k];
    }
    const float mean = device::group_sum<kLanes>(sum) * per_column_;
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const float apart = part[k].x - mean;
      if (columns_[k] > 0.0f) squares += part[k].y + columns_[k] * (apart * apart);
    }
    return {mean, device::group_sum<kLanes>(squares) * per_column_};
  }

 private:
  // 0 for a warp beyond the team's.
  __device__ __forceinline__ float columns_of(int warp, int vectors) const {
    int count = 0;
    for (int v = 0; v < vectors && warp < team_.warps; ++v) {
      const int start = 32 * kCols * (v * team_.warps + warp);
      count += max(0, min(32 * kCols, static_cast<int>(width_) - start));
    }
    return static_cast<float>(count);
  }

  const Team& team_;
  int64_t width_;
  float per_column_, own_share_, columns_[kParts];
  bool is_rms_;
};

template <typename X, int kVectors, bool kHasDropout>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Plan plan) {
  constexpr int kRows = kRowsOfUnit<kVectors>, kLanes = 32 / kRows;
  extern __shared__ __align__(16) char shared_memory[];
  __shared__ float2 parts[2][2][kMaxThreads / 32][kRows];  // [unit parity][exact, rounded][warp][row]

  const Team team(plan);
  uint32_t entry_word = blockIdx.x / plan.ctas;
  int64_t entry = entry_word;
  const int rows = static_cast<int>(p.rows);
  Stages<X, kVectors> stages(team, plan, p.width, entry, shared_memory);
  const bool is_wide_stream = p.stream_dtype == DType::kF32;
  const bool is_wide_weight = p.weight_dtype == DType::kF32;
  const bool is_rounded = sizeof(X) == 2 && !is_wide_stream && p.stream != nullptr;
  auto x_place = [&] { return Placement(p.x_subset, nullptr, p.x_rows, entry); };
  auto z_place = [&] { return Placement(p.out_subset, p.claims, p.out_rows, entry); };
  const Moments<kRows> moments(team, p.width, kVectors, p.is_rms);
  const int first_warp = team.index * team.warps;
  const DropoutKey key = kHasDropout ? DropoutKey(p, entry) : DropoutKey{};

  auto named = [&](Operand::Rows rows, int row) {
    return rows == Operand::kCompactX ? x_place().named(row) : row;
  };
  Walk walk(plan, rows, blockIdx.x % plan.ctas * plan.teams + team.index,
            plan.ctas * plan.teams);
  Unit unit, ahead;
  RowIds ids, next_ids;
  if (walk.peek(1, ahead)) next_ids.read(p, entry, ahead);
  for (int stage = 0; stage < plan.stages; ++stage) {
    const bool exists = walk.peek(stage + 1, ahead);
    stages.template fill<kRows>(stage, exists, ahead, named);
  }

  for (int stage = 0, parity = 0; walk.next(unit, z_place()); parity ^= 1) {
    entry_word = device::opaque(entry_word);  // else all that depends on it is computed ahead,
    entry = entry_word;                       // and spilled
    // s of this thread's columns
    float s[kRows][kVectors][kCols];
    if (unit.is_repeat) {
      ids.read(p, entry, unit);
      stages.template fill<kRows>(stage, true, unit, named);
    } else {
      ids = next_ids;
      if (walk.peek(1, ahead)) next_ids.read(p, entry, ahead);
    }
    stages.wait(unit.is_repeat);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = team.column(v), count = columns_left(p.width, column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kCols; ++i) s[r][v][i] = 0.0f;
      }
      float factor[kCols];
      if (p.layerscale.data) {
        load<X>(factor, p.layerscale.data, is_wide_weight,
                entry * p.layerscale.entry_stride + column, count, plan.is_aligned);
      }
#pragma unroll 1
      for (int branch = 0; branch < (p.x1.data ? 2 : 1); ++branch) {
        uint8_t* mask = branch ? p.mask1 : p.mask;
        Draws draws;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int row = unit.row[r];
          if (row < 0) continue;
          const int x_row = branch ? row : x_place().named(row);
          float a[kCols];
          if (p.x.data) {
            stages.read(a, kX + branch, stage, r, v);
          } else {  // compact, without a row
#pragma unroll
            for (int i = 0; i < kCols; ++i) a[i] = 0.0f;
          }
          uint32_t kept = x_row < 0 ? 0 : 0xff;
          if (kHasDropout) {
            draws.draw(key, kDropoutHead + branch, ids.id[r], r > 0 && ids.share_draws(),
                       column);
          }
          const float scale = scale_of_row(p, entry, row);
#pragma unroll
          for (int i = 0; i < kCols; ++i) {
            a[i] *= scale;
            if (p.layerscale.data) a[i] *= factor[i];
            if (kHasDropout) {
              const bool keeps = draws.keeps(p, i);
              a[i] = keeps ? a[i] * p.dropout_scale : 0.0f;
              if (!keeps) kept &= ~(1u << i);
            }
            s[r][v][i] += a[i];
          }
          if (mask != nullptr && !unit.is_repeat) {
            store_mask(kept, mask + (entry * p.rows + row) * p.width + column, count, plan.is_aligned);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (unit.row[r] < 0) continue;
        if (p.residual.data) {
          float a[kCols];
          stages.read(a, kResidual, stage, r, v);
#pragma unroll
          for (int i = 0; i < kCols; ++i) s[r][v][i] += a[i];
        }
        if (p.stream != nullptr && !unit.is_repeat) {
          store<X>(s[r][v], p.stream, is_wide_stream, (entry * p.rows + unit.row[r]) * p.width + column,
                   count, plan.is_aligned);
        }
      }
    }

    // The stage is free for a later unit
    __syncwarp();  // its other lanes have read, too
    const bool exists = walk.peek(plan.stages, ahead);
    stages.template fill<kRows>(stage, exists, ahead, named);
    stage = stage + 1 == plan.stages ? 0 : stage + 1;

    // Statistics
    float2 (*part)[kMaxThreads / 32][kRows] = parts[parity];
    const float2 of_warp = moments.template of_warp<float>(s);
    if (team.lane % kLanes == 0) part[0][first_warp + team.warp][team.lane / kLanes] = of_warp;
    if (is_rounded) {
      const float2 of_rounded = moments.template of_warp<X>(s);
      if (team.lane % kLanes == 0) part[1][first_warp + team.warp][team.lane / kLanes] = of_rounded;
    }
    team.sync();  // parts are there; those of the unit before last are free again
    const float2 all = moments.joined(part[0][first_warp]);
    const float rsigma_of_lane = rsqrtf(all.y + p.epsilon);
    if (team.warp == 0 && !unit.is_repeat) {
      const float2 kept = is_rounded ? moments.joined(part[1][first_warp]) : all;
      const int row = team.lane < kLanes ? unit.row[0] : unit.row[1];
      if (team.lane % kLanes == 0 && row >= 0) {
        if (p.mean) p.mean[entry * p.rows + row] = kept.x;
        p.rsigma[entry * p.rows + row] = rsqrtf(kept.y + p.epsilon);
      }
    }

    // z
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float mean = p.is_rms ? 0.0f : __shfl_sync(kWarp, all.x, kLanes * r);
      const float rsigma = __shfl_sync(kWarp, rsigma_of_lane, kLanes * r);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kCols; ++i) s[r][v][i] = (s[r][v][i] - mean) * rsigma;
      }
    }
#pragma unroll 1
    for (int norm = 0; norm < (p.z1 ? 2 : 1); ++norm) {
      const Array<void>& weights = norm ? p.weight1 : p.weight;
      const Array<void>& biases = norm ? p.bias1 : p.bias;
      void* result = norm ? p.z1 : p.z;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = team.column(v), count = columns_left(p.width, column);
        float weight[kCols], bias[kCols];
        load<X>(weight, weights.data, is_wide_weight, entry * weights.entry_stride + column, count,
                plan.is_aligned);
        if (biases.data) {
          load<X>(bias, biases.data, is_wide_weight, entry * biases.entry_stride + column, count,
                  plan.is_aligned);
        } else {
#pragma unroll
          for (int i = 0; i < kCols; ++i) bias[i] = 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (unit.row[r] < 0) continue;
          const int z_row = z_place().target(unit, unit.row[r]);
          if (z_row < 0) continue;
          const int64_t index = (entry * p.out_rows + z_row) * p.width + column;
          float z[kCols];
#pragma unroll
          for (int i = 0; i < kCols; ++i) z[i] = s[r][v][i] * weight[i] + bias[i];
          if (unit.adds) {
            float before[kCols];
            load<X>(before, result, false, index, count, plan.is_aligned);
#pragma unroll
            for (int i = 0; i < kCols; ++i) z[i] += before[i];
          }
          store<X>(z, result, false, index, count, plan.is_aligned);
        }
      }
    }
  }
}

template <typename X>
const char* forward(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  auto run = [&](auto kernel) { return launch(kernel, p, plan, stream); };
  auto with_vectors = [&]<int kVectors>() {
    return p.dropout_threshold ? run(forward_kernel<X, kVectors, true>)
                               : run(forward_kernel<X, kVectors, false>);
  };
  switch (num_vectors(p.width, kForwardWideVectors)) {
    case 1:
      return with_vectors.template operator()<1>();
    case 2:
      return with_vectors.template operator()<2>();
    default:
      return with_vectors.template operator()<kForwardWideVectors>();
  }
}

}  // namespace jax_flash::norm
