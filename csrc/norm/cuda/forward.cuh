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

// Mean and variance of kRows rows, of s and of s as the stream keeps it. Lane l has those of row
// l / kLanes.
template <typename X, int kRows, int kVectors>
class Moments {
 public:
  static constexpr int kLanes = 32 / kRows;
  static constexpr int kParts = (kMaxThreads / 32 + kLanes - 1) / kLanes;  // of a lane

  // Of one warp's columns; .x the mean, .y the sum of squares about it.
  struct OfWarp {
    float2 exact, kept;
  };

  __device__ Moments(const Team& team, int64_t width, bool is_rms)
      : team_(team), width_(static_cast<int>(width)), per_column_(1.0f / width), is_rms_(is_rms) {
    own_share_ = 1.0f / columns_of(team.warp);
  }

  // `is_rounded`: the stream is kept in X.
  __device__ __forceinline__ OfWarp of_warp(const float (&s)[kRows][kVectors][kCols],
                                            bool is_rounded) const {
    float mean = 0.0f, means[kRows] = {}, sums[kRows] = {};
    if (!is_rms_) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const float (&x)[kCols] = s[r][v];
          sums[r] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        }
      }
      mean = device::warp_sums(sums) * own_share_;
#pragma unroll
      for (int r = 0; r < kRows; ++r) means[r] = __shfl_sync(kWarp, mean, r * kLanes);
    }
    float squares[kRows] = {};
    each_column(means, [&](int r, int v, int i, float mean) {
      const float apart = s[r][v][i] - mean;
      squares[r] += apart * apart;
    });
    const float2 exact{mean, device::warp_sums(squares)};
    if (!is_rounded) return {exact, exact};

    // Of the rounded values in one pass, about the other mean, from which theirs is hardly apart
    float shift[kRows] = {}, about[kRows] = {};
    each_column(means, [&](int r, int v, int i, float mean) {
      const float apart = device::to_float(device::from_float<X>(s[r][v][i])) - mean;
      shift[r] += apart;
      about[r] += apart * apart;
    });
    if (is_rms_) return {exact, {0.0f, device::warp_sums(about)}};
    const float sum = device::warp_sums(shift), by = sum * own_share_;
    return {exact, {mean + by, device::warp_sums(about) - sum * by}};
  }

  // (mean, variance) of whole rows, from `parts` [warps][kRows].
  __device__ __forceinline__ float2 joined(const float2* parts) const {
    float2 part[kParts];
    float columns[kParts], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const int warp = team_.lane % kLanes + kLanes * k;
      part[k] = {0.0f, 0.0f};
      columns[k] = columns_of(warp);
      if (warp >= team_.warps) continue;
      part[k] = parts[kRows * warp + team_.lane / kLanes];
      sum += part[k].x * columns[k];
    }
    const float mean = is_rms_ ? 0.0f : device::group_sum<kLanes>(sum) * per_column_;
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const float apart = part[k].x - mean;
      if (columns[k] > 0.0f) squares += part[k].y + columns[k] * (apart * apart);
    }
    return {mean, device::group_sum<kLanes>(squares) * per_column_};
  }

 private:
  // Calls visit(row, vector, i, mean of the row); for columns that do not exist, and are zeros,
  // with a mean of 0.
  template <typename Visit>
  __device__ __forceinline__ void each_column(const float (&means)[kRows], Visit&& visit) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int count = columns_left(width_, team_.column(v));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          visit(r, v, i, i < count ? means[r] : 0.0f);
        }
      }
    }
  }

  // 0 for a warp beyond the team's.
  __device__ __forceinline__ float columns_of(int warp) const {
    int count = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int start = 32 * kCols * (v * team_.warps + warp);
      count += max(0, min(32 * kCols, width_ - start));
    }
    return warp < team_.warps ? static_cast<float>(count) : 0.0f;
  }

  const Team& team_;
  int width_;
  float per_column_, own_share_;
  bool is_rms_;
};

template <typename X, int kVectors>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ Plan plan) {
  constexpr int kRows = kRowsOfUnit<kVectors>, kLanes = 32 / kRows;
  extern __shared__ __align__(16) char shared_memory[];
  __shared__ float2 parts[2][2][kMaxThreads / 32][kRows];  // [unit parity][exact, kept][warp]

  const Team team(plan);
  uint32_t entry_word = blockIdx.x / plan.ctas;
  int64_t entry = entry_word;
  const int rows = static_cast<int>(p.rows), first_warp = team.index * team.warps;
  Stages<X, kRows, kVectors, 3> stages(team, plan, p.width, entry, shared_memory);
  const Moments<X, kRows, kVectors> moments(team, p.width, p.is_rms);
  const bool has_dropout = p.dropout_threshold > 0, is_aligned = plan.is_aligned;
  const bool is_wide_stream = p.stream_dtype == DType::kF32;
  const bool is_wide_weight = p.weight_dtype == DType::kF32;
  const bool is_rounded = sizeof(X) == 2 && !is_wide_stream && p.stream != nullptr;
  DropoutKey key = has_dropout ? DropoutKey(p, entry) : DropoutKey{};
  auto x_place = [&] { return Placement(p.x_subset, nullptr, p.x_rows, entry); };
  auto z_place = [&] { return Placement(p.out_subset, p.claims, p.out_rows, entry); };
  auto named = [&](Operand::Rows kind, int row) {
    return kind == Operand::kCompactX ? x_place().named(row) : row;
  };
  auto load_vector = [&](float (&vector)[kCols], const Array<void>& from, int column, int count) {
    load<X>(vector, from.data, is_wide_weight, entry * from.entry_stride + column, count,
            is_aligned);
  };

  Walk walk(plan, rows, blockIdx.x % plan.ctas * plan.teams + team.index, plan.ctas * plan.teams);
  Unit unit, ahead;
  RowIds ids, next_ids;
  if (has_dropout && walk.peek(1, ahead)) next_ids.read(p, entry, ahead);
  for (int stage = 0; stage < plan.stages; ++stage) {
    const bool exists = walk.peek(stage + 1, ahead);
    stages.fill(stage, exists, ahead, named);
  }

  for (int stage = 0, parity = 0; walk.next(unit, z_place()); parity ^= 1) {
    entry_word = device::opaque(entry_word);  // else all that depends on it is computed ahead,
    entry = entry_word;                       // and spilled
    key.key0 = device::opaque(key.key0);
    key.key1 = device::opaque(key.key1);
    const bool is_repeat = unit.is_repeat;
    if (is_repeat) {
      if (has_dropout) ids.read(p, entry, unit);
      stages.fill(stage, true, unit, named);
    } else if (has_dropout) {
      ids = next_ids;
      if (walk.peek(1, ahead)) next_ids.read(p, entry, ahead);
    }
    stages.wait(is_repeat);

    // s of this thread's columns
    float s[kRows][kVectors][kCols];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = team.column(v), count = columns_left(p.width, column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (p.residual.data && unit.row[r] >= 0) {
          stages.read(s[r][v], kResidual, stage, r, v);
        } else {
#pragma unroll
          for (int i = 0; i < kCols; ++i) s[r][v][i] = 0.0f;
        }
      }
#pragma unroll 1
      for (int branch = 0; branch < (p.x1.data ? 2 : 1); ++branch) {
        Draws draws;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int row = unit.row[r];
          if (row < 0) continue;
          float a[kCols] = {};
          if (p.x.data) stages.read(a, kX + branch, stage, r, v);  // else no compact row
          if (p.rowscale.data) {
            const float scale = scale_of_row(p, entry, row);
#pragma unroll
            for (int i = 0; i < kCols; ++i) a[i] *= scale;
          }
          if (p.layerscale.data) {
            float factor[kCols];
            load_vector(factor, p.layerscale, column, count);
#pragma unroll
            for (int i = 0; i < kCols; ++i) a[i] *= factor[i];
          }
          if (has_dropout) {
            draws.draw(key, kDropoutHead + branch, ids.id[r], r > 0 && ids.share_draws(), column);
#pragma unroll
            for (int i = 0; i < kCols; ++i) {
              a[i] = draws.keeps(p, i) ? a[i] * p.dropout_scale : 0.0f;
            }
          }
#pragma unroll
          for (int i = 0; i < kCols; ++i) s[r][v][i] += a[i];
          uint8_t* mask = branch ? p.mask1 : p.mask;
          if (mask != nullptr && !is_repeat) {
            uint32_t kept = 0;
            if (branch || x_place().named(row) >= 0) kept = has_dropout ? draws.kept(p) : 0xff;
            store_mask(kept, mask + (entry * p.rows + row) * p.width + column, count, is_aligned);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (p.stream == nullptr || unit.row[r] < 0 || is_repeat) continue;
        store<X>(s[r][v], p.stream, is_wide_stream,
                 (entry * p.rows + unit.row[r]) * p.width + column, count, is_aligned);
      }
    }

    // The stage is free for a later unit
    __syncwarp();  // its other lanes have read, too
    const bool exists = walk.peek(plan.stages, ahead);
    stages.fill(stage, exists, ahead, named);
    stage = stage + 1 == plan.stages ? 0 : stage + 1;

    // Statistics
    auto* part = parts[parity];
    const auto of_warp = moments.of_warp(s, is_rounded);
    if (team.lane % kLanes == 0) {
      part[0][first_warp + team.warp][team.lane / kLanes] = of_warp.exact;
      part[1][first_warp + team.warp][team.lane / kLanes] = of_warp.kept;
    }
    team.sync();  // parts are there; those of the unit before last are free again
    const float2 all = moments.joined(part[0][first_warp]);
    const float rsigma_of_lane = rsqrtf(all.y + p.epsilon);
    if (team.warp == team.warps - 1 && !is_repeat) {
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
      const float mean = __shfl_sync(kWarp, all.x, kLanes * r);
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
        float weight[kCols], bias[kCols] = {};
        load_vector(weight, weights, column, count);
        if (biases.data) load_vector(bias, biases, column, count);
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
            load<X>(before, result, false, index, count, is_aligned);
#pragma unroll
            for (int i = 0; i < kCols; ++i) z[i] += before[i];
          }
          store<X>(z, result, false, index, count, is_aligned);
        }
      }
    }
  }
}

template <typename X>
const char* forward(const ForwardParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.vectors > 2) return launch(forward_kernel<X, kForwardWideVectors>, p, plan, stream);
  return launch(forward_kernel<X, 2>, p, plan, stream);
}

}  // namespace jax_flash::norm
