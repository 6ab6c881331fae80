// The backward of the common call (layout.h): one pass over memory, with the sums over rows on the
// way.
//
//   y  = (stream - mean) * rsigma,   dy = dz * weight
//   ds = (dy - y * mean(dy * y) - mean(dy)) * rsigma + dstream            (RMS: without mean(dy))
//   dx = dropout(ds),   dweight = sum of dz * y,   dbias = sum of dz
//
// One CTA fills an SM. A thread has two vectors of 8 columns, whose sums stay in its registers
// while its team goes through rows (with dropout pairs of rows, layout.h). The next units are on
// their way into shared memory, where every thread copies what it will read itself: the sums across
// the team are a unit's only barrier. Teams, then CTAs are added in a fixed order: the same bits in
// every run on the same kind of GPU.
#pragma once

#include "device/opaque.cuh"
#include "norm/cuda/dropout.cuh"
#include "norm/cuda/layout.h"
#include "norm/cuda/pace.cuh"
#include "norm/cuda/rows.cuh"

namespace jax_flash::norm {

// A thread's own places in shared memory, [warp][stage][row][vector][stream, dz, dstream]: chunks
// of 16 bytes, those of neighbouring lanes beside each other.
template <typename X, typename S, bool kHasDropout>
class OwnStages {
 public:
  static constexpr int kRows = backward_rows(sizeof(S), kHasDropout);
  static constexpr int kChunksX = Raw<X>::kChunks, kChunksS = Raw<S>::kChunks;
  static constexpr int kChunks = kChunksX + 2 * kChunksS;  // of a vector of all three
  static constexpr int kBytes = backward_stage_bytes(sizeof(X), sizeof(S), kHasDropout);
  static_assert(kBytes == kRows * kBackwardVectors * kChunks * kChunkBytes);

  __device__ OwnStages(char* memory, int stages)
      : own_(ptx::shared_address(memory) + threadIdx.x / 32 * (stages * kBytes) +
             16 * (threadIdx.x % 32)) {}

  __device__ __forceinline__ void copy_stream(int stage, int r, int v, const S* source,
                                              bool exists) const {
    Raw<S>::start_copy(place(stage, r, v, 0), source, exists);
  }
  __device__ __forceinline__ void copy_dz(int stage, int r, int v, const X* source,
                                          bool exists) const {
    Raw<X>::start_copy(place(stage, r, v, kChunksS), source, exists);
  }
  __device__ __forceinline__ void copy_dstream(int stage, int r, int v, const S* source,
                                               bool exists) const {
    Raw<S>::start_copy(place(stage, r, v, kChunksS + kChunksX), source, exists);
  }
  __device__ __forceinline__ void read_stream(float (&x)[kCols], int stage, int r, int v) const {
    Raw<S>::copied(place(stage, r, v, 0)).widen(x);
  }
  __device__ __forceinline__ void read_dz(float (&x)[kCols], int stage, int r, int v) const {
    Raw<X>::copied(place(stage, r, v, kChunksS)).widen(x);
  }
  __device__ __forceinline__ void read_dstream(float (&x)[kCols], int stage, int r, int v) const {
    Raw<S>::copied(place(stage, r, v, kChunksS + kChunksX)).widen(x);
  }

 private:
  __device__ __forceinline__ uint32_t place(int stage, int r, int v, int chunk) const {
    return own_ + stage * kBytes + ((r * kBackwardVectors + v) * kChunks + chunk) * kChunkBytes;
  }

  uint32_t own_;
};

// The weight of a thread's columns there, as floats: what all rows need finds no place in the rest
// of L1.
class OwnWeight {
 public:
  __device__ explicit OwnWeight(char* memory)
      : own_(ptx::shared_address(memory) + threadIdx.x / 32 * kBackwardWeightBytes +
             16 * (threadIdx.x % 32)) {}

  __device__ __forceinline__ void write(const float (&x)[kCols], int v) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) ptx::store_shared_16(place(v, c), narrow<float>(x + 4 * c));
  }
  __device__ __forceinline__ void read(float (&x)[kCols], int v) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) widen<float>(x + 4 * c, ptx::load_shared_16(place(v, c)));
  }

 private:
  __device__ __forceinline__ uint32_t place(int v, int c) const {
    return own_ + (2 * v + c) * kChunkBytes;
  }

  uint32_t own_;
};

template <typename X, typename S, bool kHasDropout, typename Before>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_common_kernel(const __grid_constant__ BackwardParams p,
                           const __grid_constant__ Layout layout) {
  using Stages = OwnStages<X, S, kHasDropout>;
  constexpr int kRows = Stages::kRows, kVectors = kBackwardVectors;
  constexpr int kWarpColumns = 32 * kCols * kVectors;
  constexpr int kValues = 2 * kRows, kLanes = 32 / kValues;  // two means of each row
  extern __shared__ __align__(16) char shared_memory[];
  __shared__ float parts[2][kBackwardThreads / 32][kValues];  // [unit parity][warp]

  const int lane = threadIdx.x % 32, cta_warp = device::uniform(static_cast<int>(threadIdx.x) / 32);
  const int warps = layout.warps, team = cta_warp / warps, first_warp = team * warps;
  const int width = static_cast<int>(p.width), rows = static_cast<int>(p.rows);
  const int column = kWarpColumns * (cta_warp - first_warp) + kCols * lane;
  const uint32_t entry = blockIdx.y, cta = blockIdx.x;
  auto has_column = [&](int v) { return column + 32 * kCols * v < width; };

  // The team's units, and their rows on the way
  const int step = layout.ctas * layout.teams;
  auto first_row = [&](int unit) { return kRows == 2 ? unit / 8 * 16 + unit % 8 : unit; };
  auto has_row = [&](int row, int r) { return r == 0 || row + 8 < rows; };
  const Stages stages(shared_memory, layout.stages);
  const auto* stream =
      static_cast<const S*>(p.stream.data) + entry * p.stream.entry_stride + column;
  const auto* dz = static_cast<const X*>(p.dz.data) + entry * p.dz.entry_stride + column;
  const auto* dstream =
      static_cast<const S*>(p.dstream.data) + entry * p.dstream.entry_stride + column;
  struct Sources {
    const S *stream, *dstream;
    const X* dz;
  };
  auto sources = [&](int row, int r) {
    const int64_t from = int64_t{row + 8 * r} * width;
    return Sources{device::opaque(stream + from), device::opaque(dstream + from),
                   device::opaque(dz + from)};
  };
  const bool has_dstream = p.dstream.data != nullptr;  // else zeros
  auto copy = [&](int stage, int r, int v, const Sources& from) {
    const int of_vector = 32 * kCols * v;
    stages.copy_stream(stage, r, v, from.stream + of_vector, has_column(v));
    stages.copy_dz(stage, r, v, from.dz + of_vector, has_column(v));
    stages.copy_dstream(stage, r, v, from.dstream + of_vector, has_column(v) && has_dstream);
  };
  int unit = cta * layout.teams + team;
  Before::wait();
  for (int stage = 0; stage < layout.stages; ++stage) {
    const int ahead = unit + stage * step, row = first_row(ahead);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (ahead >= layout.units || !has_row(row, r)) continue;
      const Sources from = sources(row, r);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) copy(stage, r, v, from);
    }
    ptx::cp_async_commit();
  }

  const bool leads = cta_warp == first_warp;
  Pace pace(layout);

  const OwnWeight weights(shared_memory + blockDim.x / 32 * layout.stages * stages.kBytes);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = column + 32 * kCols * v;
    float weight[kCols];
    load<X>(weight, p.weight.data, p.weight_dtype == DType::kF32,
            entry * p.weight.entry_stride + at, width - at, true);
    weights.write(weight, v);
  }

  DropoutKey key;
  if (kHasDropout) key = DropoutKey(p, entry);
  // A unit's mean, rsigma and row numbers, read by lanes 0 to 5
  const uint32_t* numbers = nullptr;
  {
    const int kind = lane / kRows;
    if (kind == 0 && p.mean.data) {
      numbers = reinterpret_cast<const uint32_t*>(p.mean.data + entry * p.mean.entry_stride);
    } else if (kind == 1) {
      numbers = reinterpret_cast<const uint32_t*>(p.rsigma.data + entry * p.rsigma.entry_stride);
    } else if (kind == 2 && kHasDropout) {
      numbers = p.row_ids.data + entry * p.row_ids.entry_stride;
    }
  }
  auto read_number = [&](int unit) {
    return numbers ? numbers[min(first_row(unit) + 8 * (lane % kRows), rows - 1)] : 0u;
  };
  uint32_t next_number = read_number(unit);

  float dweight[kVectors][kCols] = {}, dbias[kVectors][kCols] = {};
  int turn = 0;
  for (int stage = 0, parity = 0; unit < layout.units; unit += step, parity ^= 1) {
    const int row = first_row(unit), ahead = unit + layout.stages * step;
    const int row_ahead = first_row(ahead);
    float rsigma[kRows], shift[kRows];  // y = stream * rsigma + shift
    uint32_t id[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rsigma[r] = __uint_as_float(__shfl_sync(kWarp, next_number, kRows + r));
      shift[r] = -__uint_as_float(__shfl_sync(kWarp, next_number, r)) * rsigma[r];
      if (kHasDropout) id[r] = __shfl_sync(kWarp, next_number, 2 * kRows + r);
    }
    next_number = read_number(unit + step);
    Kept kept;
    if constexpr (kHasDropout) {            // while the rows are on their way
      key.key0 = device::opaque(key.key0);  // else all rounds' keys are kept in registers
      key.key1 = device::opaque(key.key1);
      kept.draw(p, key, kDropoutHead, id, column);
    }
    wait_for_oldest(layout.stages);

    // The two means of each row, and the sums over rows
    float sums[kValues] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float weight[kCols];
      weights.read(weight, v);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!has_row(row, r)) continue;
        float y[kCols], d[kCols];
        stages.read_stream(y, stage, r, v);
        stages.read_dz(d, stage, r, v);
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          y[i] = y[i] * rsigma[r] + shift[r];
          const float dy = d[i] * weight[i];
          sums[2 * r] += dy * y[i];
          sums[2 * r + 1] += dy;
          dweight[v][i] += d[i] * y[i];
          dbias[v][i] += d[i];
        }
      }
    }
    const float of_warp = device::warp_sums(sums);
    if (lane % kLanes == 0) parts[parity][cta_warp][lane / kLanes] = of_warp;
    if (leads) pace.wait(turn);
    __syncwarp();
    sync_team(team, warps);  // parts are there; those of the unit before last are free again
    float of_row = 0.0f;
#pragma unroll
    for (int first = 0; first < kBackwardThreads / 32; first += kLanes) {
      const int warp = first + lane % kLanes;
      if (warp < warps) of_row += parts[parity][first_warp + warp][lane / kLanes];
    }
    of_row = device::group_sum<kLanes>(of_row) * layout.per_column;

    // ds = (dz * weight + of_stream * stream + of_one) * rsigma + dstream
    float of_stream[kRows], of_one[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float along = __shfl_sync(kWarp, of_row, 2 * r * kLanes);
      const float total = __shfl_sync(kWarp, of_row, (2 * r + 1) * kLanes);
      of_stream[r] = -along * rsigma[r];
      of_one[r] = -along * shift[r] - (p.is_rms ? 0.0f : total);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!has_row(row, r)) continue;
      const bool copies = ahead < layout.units && has_row(row_ahead, r);
      const Sources from = sources(row_ahead, r);
      const int64_t own = (int64_t{entry} * rows + row + 8 * r) * width + column;
      auto* dx = device::opaque(static_cast<X*>(p.dx) + own);
      auto* dresidual = device::opaque(static_cast<S*>(p.dresidual) + own);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float weight[kCols], ds[kCols], a[kCols];
        weights.read(weight, v);
        stages.read_dz(ds, stage, r, v);
        stages.read_stream(a, stage, r, v);
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          ds[i] = ds[i] * weight[i] + (a[i] * of_stream[r] + of_one[r]);
        }
        stages.read_dstream(a, stage, r, v);
#pragma unroll
        for (int i = 0; i < kCols; ++i) ds[i] = ds[i] * rsigma[r] + a[i];
        if (copies) copy(stage, r, v, from);
        if (p.dresidual && has_column(v)) Raw<S>::narrow(ds).store(dresidual + 32 * kCols * v);
        if (kHasDropout) {
#pragma unroll
          for (int i = 0; i < kCols; ++i) ds[i] *= p.dropout_scale;
        }
        auto result = Raw<X>::narrow(ds);
        if (kHasDropout) kept.drop(result.chunk, v, r);
        if (has_column(v)) result.store(dx + 32 * kCols * v);
      }
    }

    if (leads) pace.tell();
    ++turn;
    ptx::cp_async_commit();
    stage = stage + 1 == layout.stages ? 0 : stage + 1;
  }

  // Add up the CTA's teams: [sum][team][columns]
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody copies into the stages, or reads them, any more
  auto* team_sums = reinterpret_cast<float*>(shared_memory);
  const int columns = kWarpColumns * warps;
  auto keep = [&](int sum, const float (&x)[kVectors][kCols]) {
    float* own = team_sums + (sum * layout.teams + team) * columns + column;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kCols; i += 4) {
        *reinterpret_cast<float4*>(own + 32 * kCols * v + i) = {x[v][i], x[v][i + 1], x[v][i + 2],
                                                                x[v][i + 3]};
      }
    }
  };
  keep(0, dweight);
  if (p.dbias) keep(1, dbias);
  __syncthreads();  // the teams' sums are there
  for (int at = 4 * threadIdx.x; at < (p.dbias ? 2 : 1) * width; at += 4 * blockDim.x) {
    const int sum = at >= width, from = at - sum * width;
    float4 total{};
    for (int t = 0; t < layout.teams; ++t) {
      const float4 x =
          *reinterpret_cast<const float4*>(team_sums + (sum * layout.teams + t) * columns + from);
      total = {total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w};
    }
    *reinterpret_cast<float4*>(
        p.partials + ((sum * p.entries + entry) * p.num_partials + cta) * width + from) = total;
  }
}

template <typename X, typename Before>
const char* backward_common(const BackwardParams& p, const Layout& layout, cudaStream_t stream) {
  return launch_common<X, Before>(p, layout, stream, []<typename S>(S, auto has_dropout) {
    return &backward_common_kernel<X, S, has_dropout.value, Before>;
  });
}

}  // namespace jax_flash::norm
