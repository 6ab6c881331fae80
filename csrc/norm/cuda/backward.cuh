// The backward: one pass over memory, with the sums over rows on the way.
//
//   y  = (stream - mean) * rsigma,   dy = dz * weight [+ dz1 * weight1]
//   ds = (dy - y * mean(dy * y) - mean(dy)) * rsigma + dstream            (RMS: without mean(dy))
//   dx = dropout(ds) * rowscale * layerscale
//   dweight = sum of dz * y,   dbias = sum of dz,   dlayerscale = sum of dropout(ds) * rowscale * x
//
// The rows of a unit lie in shared memory until it is done, and are read there twice: for the two
// means of each row, and for the results. Every thread sums its own columns over its team's units
// in registers (those of the rarer sums in shared memory); teams, then CTAs are added in a fixed
// order: the same bits in every run on the same kind of GPU.
#pragma once

#include "device/opaque.cuh"
#include "norm/cuda/dropout.cuh"
#include "norm/cuda/instances.h"
#include "norm/cuda/rows.cuh"

namespace jax_flash::norm {

enum BackwardOperand { kStream, kDz, kDstream, kDz1, kScaledX };

struct RowStatistics {
  float mean[2], rsigma[2];

  __device__ __forceinline__ void read(const BackwardParams& p, int64_t entry, const Unit& unit) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = max(unit.row[r], 0);
      mean[r] = p.mean.data ? p.mean.data[entry * p.mean.entry_stride + row] : 0.0f;
      rsigma[r] = p.rsigma.data[entry * p.rsigma.entry_stride + row];
    }
  }
};

template <typename X, int kVectors>
__global__ void __launch_bounds__(kVectors > 2 ? kMaxThreads / 2 : kMaxThreads)
    backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Plan plan) {
  constexpr int kRows = kRowsOfUnit<kVectors>;
  constexpr int kValues = 2 * kRows, kLanes = 32 / kValues;  // two means of each row
  extern __shared__ __align__(16) char shared_memory[];
  __shared__ float parts[2][kMaxThreads / 32][kValues];  // [unit parity][warp]

  const Team team(plan);
  uint32_t entry_word = blockIdx.x / plan.ctas;
  int64_t entry = entry_word;
  const int cta = blockIdx.x % plan.ctas;
  Stages<X, kRows, kVectors, 5> stages(team, plan, p.width, entry, shared_memory);
  const bool has_dropout = p.dropout_threshold > 0, is_aligned = plan.is_aligned;
  const bool is_wide_stream = p.stream_dtype == DType::kF32;
  const bool is_wide_weight = p.weight_dtype == DType::kF32;
  DropoutKey key = has_dropout ? DropoutKey(p, entry) : DropoutKey{};
  auto x_place = [&] { return Placement(p.x_subset, p.claims, p.x_rows, entry); };
  auto z_place = [&] { return Placement(p.out_subset, nullptr, p.out_rows, entry); };
  auto named = [&](Operand::Rows rows, int row) {
    if (rows == Operand::kCompactX) return x_place().named(row);
    return rows == Operand::kCompactZ ? z_place().named(row) : row;
  };
  auto load_vector = [&](float (&vector)[kCols], const Array<void>& from, int v) {
    const int column = team.column(v);
    load<X>(vector, from.data, is_wide_weight, entry * from.entry_stride + column,
            columns_left(p.width, column), is_aligned);
  };

  // Sums over rows: two in registers, others in shared memory
  float dweight[kVectors][kCols] = {}, dbias[kVectors][kCols] = {};
  const int columns = plan.sums_bytes / 4;
  float* sums = reinterpret_cast<float*>(shared_memory + plan.stages_bytes) +
                team.index * plan.num_sums * columns;
  auto add_to = [&](int sum, int v, int i, float value) {
    sums[sum * columns + team.column(v) + i] += value;
  };
  for (int i = team.thread; i < plan.num_sums * columns; i += team.threads) sums[i] = 0.0f;
  __syncthreads();

  Walk walk(plan, static_cast<int>(p.rows), cta * plan.teams + team.index, plan.ctas * plan.teams);
  Unit unit, ahead;
  RowIds ids, next_ids;
  RowStatistics statistics, next_statistics;
  auto read_scalars = [&](const Unit& of, RowIds& row_ids, RowStatistics& row_statistics) {
    if (has_dropout) row_ids.read(p, entry, of);
    row_statistics.read(p, entry, of);
  };
  if (walk.peek(1, ahead)) read_scalars(ahead, next_ids, next_statistics);
  for (int stage = 0; stage < plan.stages; ++stage) {
    const bool exists = walk.peek(stage + 1, ahead);
    stages.fill(stage, exists, ahead, named);
  }

  for (int stage = 0, parity = 0; walk.next(unit, x_place()); parity ^= 1) {
    entry_word = device::opaque(entry_word);  // else all that depends on it is computed ahead,
    entry = entry_word;                       // and spilled
    key.key0 = device::opaque(key.key0);
    key.key1 = device::opaque(key.key1);
    const bool is_repeat = unit.is_repeat;
    if (is_repeat) {
      read_scalars(unit, ids, statistics);
      stages.fill(stage, true, unit, named);
    } else {
      ids = next_ids;
      statistics = next_statistics;
      if (walk.peek(1, ahead)) read_scalars(ahead, next_ids, next_statistics);
    }
    stages.wait(is_repeat);

    // The two means of each row, and the sums over rows of dz and dz * y
    float values[kValues] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float weight[kCols];
      load_vector(weight, p.weight, v);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (unit.row[r] < 0) continue;
        float y[kCols], d[kCols], along = 0.0f, total = 0.0f;
        stages.read(y, kStream, stage, r, v);
        stages.read(d, kDz, stage, r, v);
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          y[i] = (y[i] - statistics.mean[r]) * statistics.rsigma[r];
          const float dy = d[i] * weight[i];
          along += dy * y[i];
          total += dy;
          if (is_repeat) continue;
          dweight[v][i] += d[i] * y[i];
          dbias[v][i] += d[i];
        }
        if (p.dz1.data) {
          float weight1[kCols];
          load_vector(weight1, p.weight1, v);
          stages.read(d, kDz1, stage, r, v);
#pragma unroll
          for (int i = 0; i < kCols; ++i) {
            const float dy = d[i] * weight1[i];
            along += dy * y[i];
            total += dy;
            if (is_repeat) continue;
            add_to(0, v, i, d[i] * y[i]);
            if (p.dbias1) add_to(1, v, i, d[i]);
          }
        }
        values[2 * r] += along;
        values[2 * r + 1] += total;
      }
    }
    float (*part)[kValues] = &parts[parity][team.index * team.warps];
    const float of_warp = device::warp_sums(values);
    if (team.lane % kLanes == 0) part[team.warp][team.lane / kLanes] = of_warp;
    team.sync();  // parts are there; those of the unit before last are free again
    float of_row = 0.0f;
#pragma unroll
    for (int first = 0; first < kMaxThreads / 32; first += kLanes) {
      const int warp = first + team.lane % kLanes;
      if (warp < team.warps) of_row += part[warp][team.lane / kLanes];
    }
    of_row = device::group_sum<kLanes>(of_row) / p.width;
    float along[kRows], total[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      along[r] = __shfl_sync(kWarp, of_row, 2 * r * kLanes);
      total[r] = __shfl_sync(kWarp, of_row, (2 * r + 1) * kLanes);
      if (p.is_rms) total[r] = 0.0f;
    }

    // Gradients of the rows
    Draws draws;
#pragma unroll 1
    for (int k = 0; k < kRows * kVectors; ++k) {
      const int v = k / kRows, r = k % kRows, row = r ? unit.row[1] : unit.row[0];
      if (row < 0) continue;
      const int column = team.column(v), count = columns_left(p.width, column);
      const float mean = r ? statistics.mean[1] : statistics.mean[0];
      const float rsigma = r ? statistics.rsigma[1] : statistics.rsigma[0];
      const float of_y = (r ? along[kRows - 1] : along[0]) * rsigma * rsigma;
      const float of_one = mean * of_y - (r ? total[kRows - 1] : total[0]) * rsigma;

      // ds = (dy - y * mean(dy * y) - mean(dy)) * rsigma + dstream
      float ds[kCols], d[kCols], weight[kCols];
      load_vector(weight, p.weight, v);
      stages.read(d, kDz, stage, r, v);
#pragma unroll
      for (int i = 0; i < kCols; ++i) ds[i] = d[i] * weight[i];
      if (p.dz1.data) {
        load_vector(weight, p.weight1, v);
        stages.read(d, kDz1, stage, r, v);
#pragma unroll
        for (int i = 0; i < kCols; ++i) ds[i] += d[i] * weight[i];
      }
      stages.read(d, kStream, stage, r, v);
#pragma unroll
      for (int i = 0; i < kCols; ++i) ds[i] = ds[i] * rsigma + (of_one - d[i] * of_y);
      if (p.dstream.data) {
        stages.read(d, kDstream, stage, r, v);
#pragma unroll
        for (int i = 0; i < kCols; ++i) ds[i] += d[i];
      }
      if (p.dresidual && !is_repeat) {
        store<X>(ds, p.dresidual, is_wide_stream, (entry * p.rows + row) * p.width + column, count,
                 is_aligned);
      }

      // dx, and dx1, whose mask is another one
      const uint32_t id = r ? ids.id[1] : ids.id[0];
#pragma unroll 1
      for (int branch = 0; branch < (p.dx1 ? 2 : 1); ++branch) {
#pragma unroll
        for (int i = 0; i < kCols; ++i) d[i] = ds[i];
        if (has_dropout) {
          const bool again = r > 0 && !p.dx1 && ids.share_draws();
          draws.draw(key, kDropoutHead + branch, id, again, column);
#pragma unroll
          for (int i = 0; i < kCols; ++i) d[i] = draws.keeps(p, i) ? d[i] * p.dropout_scale : 0.0f;
        }
        if (p.rowscale.data) {
          const float scale = scale_of_row(p, entry, row);
#pragma unroll
          for (int i = 0; i < kCols; ++i) d[i] *= scale;
        }
        if (p.layerscale.data) {
          float factor[kCols];
          if (p.dlayerscale && !is_repeat) {
            stages.read(factor, kScaledX, stage, r, v);
#pragma unroll
            for (int i = 0; i < kCols; ++i) {
              const bool counts = !has_dropout || draws.keeps(p, i);  // else x may be NaN
              if (counts) add_to(plan.num_sums - 1, v, i, d[i] * factor[i]);
            }
          }
          load_vector(factor, p.layerscale, v);
#pragma unroll
          for (int i = 0; i < kCols; ++i) d[i] *= factor[i];
        }
        const int x_row = x_place().target(unit, row);
        if (x_row < 0) continue;
        void* result = branch ? p.dx1 : p.dx;
        const int64_t index = (entry * p.x_rows + x_row) * p.width + column;
        if (unit.adds) {
          float before[kCols];
          load<X>(before, result, false, index, count, is_aligned);
#pragma unroll
          for (int i = 0; i < kCols; ++i) d[i] += before[i];
        }
        store<X>(d, result, false, index, count, is_aligned);
      }
    }

    // The stage is free for a later unit
    __syncwarp();  // its other lanes have read, too
    const bool exists = walk.peek(plan.stages, ahead);
    stages.fill(stage, exists, ahead, named);
    stage = stage + 1 == plan.stages ? 0 : stage + 1;
  }

  // Add up the CTA's teams, one row of sums after the other
  ptx::cp_async_wait<0>();
  float* partial = p.partials + (entry * p.num_partials + cta) * p.width;
  const int64_t next_partial = p.entries * p.num_partials * p.width;
  auto join = [&](const float* rows, int stride) {
    for (int column = threadIdx.x; column < p.width; column += blockDim.x) {
      float total = 0.0f;
      for (int t = 0; t < plan.teams; ++t) total += rows[t * stride + column];
      partial[column] = total;
    }
    partial += next_partial;
  };
  auto join_registers = [&](const float (&sum)[kVectors][kCols]) {
    float* rows = reinterpret_cast<float*>(shared_memory);
    __syncthreads();  // nobody reads a stage, or the sums before, any more
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kCols; ++i) rows[team.index * columns + team.column(v) + i] = sum[v][i];
    }
    __syncthreads();
    join(rows, columns);
  };
  join_registers(dweight);
  if (p.dbias) join_registers(dbias);
  __syncthreads();
  const float* kept = reinterpret_cast<const float*>(shared_memory + plan.stages_bytes);
  if (p.dweight1) join(kept, plan.num_sums * columns);
  if (p.dbias1) join(kept + columns, plan.num_sums * columns);
  if (p.dlayerscale) join(kept + (plan.num_sums - 1) * columns, plan.num_sums * columns);
}

template <typename X>
const char* backward(const BackwardParams& p, const Plan& plan, cudaStream_t stream) {
  if (plan.vectors > 2) return launch(backward_kernel<X, kBackwardWideVectors>, p, plan, stream);
  return launch(backward_kernel<X, 2>, p, plan, stream);
}

}  // namespace jax_flash::norm
