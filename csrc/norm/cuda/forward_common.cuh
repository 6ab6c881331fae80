// The forward of the common call (layout.h): a team of warps has one row, or a pair of rows that
// share their random draws, in registers from the first load to the last store. Many CTAs on an SM,
// each with all its loads in flight at once, hide each other's latencies. Nothing is copied ahead,
// but rows of CTAs that start soon may be brought into L2.
//
//   s = residual + dropout(x),   kept rounded
//   z = (s - mean) * rsigma * weight + bias                              of s before it is rounded
//
// The variance comes from each warp's squares about the warp's own mean, joined across warps: one
// barrier, and no cancellation.
#pragma once

#include "device/opaque.cuh"
#include "norm/cuda/dropout.cuh"
#include "norm/cuda/layout.h"
#include "norm/cuda/rows.cuh"

namespace jax_flash::norm {

// 16 bytes a time of a pair's rows in shared memory, [warp][row][vector][x, residual][lane]: every
// thread copies what it will read itself.
template <typename X, typename S>
class OwnPair {
 public:
  __device__ explicit OwnPair(char* memory)
      : own_(ptx::shared_address(memory) + threadIdx.x / 32 * kWarpBytes +
             16 * (threadIdx.x % 32)) {}

  __device__ __forceinline__ void copy_x(int r, int v, const X* source, bool exists) const {
    Raw<X>::start_copy(place(r, v), source, exists);
  }
  __device__ __forceinline__ void copy_residual(int r, int v, const S* source, bool exists) const {
    Raw<S>::start_copy(place(r, v) + Raw<X>::kChunks * kChunkBytes, source, exists);
  }
  __device__ __forceinline__ Raw<X> x(int r, int v) const { return Raw<X>::copied(place(r, v)); }
  __device__ __forceinline__ Raw<S> residual(int r, int v) const {
    return Raw<S>::copied(place(r, v) + Raw<X>::kChunks * kChunkBytes);
  }

 private:
  static constexpr int kBytes = (Raw<X>::kChunks + Raw<S>::kChunks) * kChunkBytes;  // of a vector
  static constexpr int kWarpBytes = 2 * kForwardVectors * kBytes;

  __device__ __forceinline__ uint32_t place(int r, int v) const {
    return own_ + (r * kForwardVectors + v) * kBytes;
  }

  uint32_t own_;
};

// Brings what a warp's lanes have at `own` into L2: of those that share a line, one asks for it.
template <typename Element>
__device__ __forceinline__ void prefetch_lines(const Element* own, int lane) {
  constexpr int kLanesOfLine = 128 / (kCols * sizeof(Element));
  if (lane % kLanesOfLine == 0) ptx::prefetch_l2(own);
}

template <typename X, typename S, bool kHasDropout, typename Before>
__global__ void __launch_bounds__(kForwardThreads, 2)
    forward_common_kernel(const __grid_constant__ ForwardParams p,
                          const __grid_constant__ Layout layout) {
  constexpr int kRows = kHasDropout ? 2 : 1, kVectors = kForwardVectors;
  constexpr int kWarpColumns = 32 * kCols * kVectors;
  constexpr bool kIsRounded = sizeof(S) == 2;  // then mean and rsigma are those of rounded columns
  __shared__ float2 parts[kRows][2][16];       // [row][exact, kept][warp]: mean, squares about it

  const int lane = threadIdx.x % 32, cta_warp = device::uniform(static_cast<int>(threadIdx.x) / 32);
  const int warps = layout.warps;
  const int warp = warps == 1 ? 0 : cta_warp, team = warps == 1 ? cta_warp : 0;
  const uint32_t entry = blockIdx.y;
  const int unit = blockIdx.x * layout.teams + team;
  if (unit >= layout.units) return;
  const int first = kRows == 2 ? unit / 8 * 16 + unit % 8 : unit;
  const int width = static_cast<int>(p.width), column = kWarpColumns * warp + kCols * lane;
  const int64_t own = int64_t{first} * width + column, own_result = entry * p.rows * width + own;
  auto offset = [&](int r, int v) { return r * 8 * int64_t{width} + 32 * kCols * v; };
  auto at = [&]<typename T>(T* base, int64_t own) { return device::opaque(base + own); };
  bool has_row[kRows], has_column[kVectors];
#pragma unroll
  for (int r = 0; r < kRows; ++r) has_row[r] = r == 0 || first + 8 < p.rows;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) has_column[v] = column + 32 * kCols * v < width;

  Before::wait();
  // All loads; what does not exist is 0
  const auto* x = at(static_cast<const X*>(p.x.data), entry * p.x.entry_stride + own);
  const auto* residual =
      at(static_cast<const S*>(p.residual.data), entry * p.residual.entry_stride + own);
  if (layout.rows_ahead > 0 && first + layout.rows_ahead < p.rows) {  // of a pair one row
    const int64_t ahead = int64_t{layout.rows_ahead} * width;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!has_column[v]) break;
      prefetch_lines(x + ahead + 32 * kCols * v, lane);
      if (p.residual.data) prefetch_lines(residual + ahead + 32 * kCols * v, lane);
    }
  }
  extern __shared__ __align__(16) char shared_memory[];
  const OwnPair<X, S> pair(shared_memory);
  Raw<X> raw_x[kRows][kVectors];
  Raw<S> raw_residual[kRows][kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool exists = has_row[r] && has_column[v];
      if (kHasDropout) {
        pair.copy_x(r, v, x + offset(r, v), exists);
        pair.copy_residual(r, v, residual + offset(r, v), exists && p.residual.data);
      } else if (exists) {
        raw_x[r][v] = Raw<X>::load(x + offset(r, v));
        if (p.residual.data) raw_residual[r][v] = Raw<S>::load(residual + offset(r, v));
      }
    }
  }
  if (kHasDropout) ptx::cp_async_commit();

  // Draws, while the loads are on their way
  Kept kept;
  if constexpr (kHasDropout) {
    const DropoutKey key(p, entry);
    uint32_t id[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (has_row[r]) id[r] = p.row_ids.data[entry * p.row_ids.entry_stride + first + 8 * r];
    }
    kept.draw(p, key, kDropoutHead, id, column);
  }

  // s, its sums, and the stream
  auto* stream = at(static_cast<S*>(p.stream), own_result);
  if (kHasDropout) ptx::cp_async_wait<0>();
  float s[kRows][kVectors][kCols], sums[kRows] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float a[kCols];
      if (kHasDropout) {
        raw_x[r][v] = pair.x(r, v);
        raw_residual[r][v] = pair.residual(r, v);
      }
      if (kHasDropout) kept.drop(raw_x[r][v].chunk, v, r);
      raw_x[r][v].widen(a);
      raw_residual[r][v].widen(s[r][v]);
#pragma unroll
      for (int i = 0; i < kCols; ++i) {
        if (kHasDropout) a[i] *= p.dropout_scale;
        s[r][v][i] += a[i];
        sums[r] += s[r][v][i];
      }
      const auto rounded = Raw<S>::narrow(s[r][v]);
      if (p.stream != nullptr && has_row[r] && has_column[v]) rounded.store(stream + offset(r, v));
    }
  }

  // Moments of the warp's columns
  const float last_count = width - kWarpColumns * (warps - 1);
  auto count_of = [&](int w) {
    return w < warps - 1 ? float{kWarpColumns} : w == warps - 1 ? last_count : 0.0f;
  };
  const float share = warp < warps - 1 ? 1.0f / kWarpColumns : layout.per_last_column;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float mean = p.is_rms ? 0.0f : device::warp_sum(sums[r]) * share;
    float squares[4] = {};  // about the mean; of rounded columns: distance from it, squares
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float about = has_column[v] ? mean : 0.0f;
#pragma unroll
      for (int i = 0; i < kCols; ++i) {
        const float apart = s[r][v][i] - about;
        squares[0] += apart * apart;
      }
      if constexpr (kIsRounded) {
        float rounded[kCols];
        Raw<S>::narrow(s[r][v]).widen(rounded);
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          const float apart = rounded[i] - about;
          squares[1] += apart;
          squares[2] += apart * apart;
        }
      }
    }
    float2 part{mean, 0.0f};
    if constexpr (kIsRounded) {
      part.y = device::warp_sums(squares);  // lanes from 0, 8, 16: of squares[0], [1], [2]
      const float exact = __shfl_sync(kWarp, part.y, 0);
      const float distance = __shfl_sync(kWarp, part.y, 8);
      if (lane == 16 && p.stream == nullptr) {
        part.y = exact;  // nothing is rounded
      } else if (lane == 16 && !p.is_rms) {
        part.x += distance * share;
        part.y -= distance * share * distance;
      }
    } else {
      part.y = device::warp_sum(squares[0]);
    }
    if (lane % 16 == 0) parts[r][lane / 16][cta_warp] = part;
  }
  if (warps == 1) {
    __syncwarp();
  } else {
    __syncthreads();  // the warps' parts are there
  }

  // Statistics of the rows: of s in the lanes below 16, of the stream as it is kept in the others.
  // Squares about the first warp's mean; the mean is at most sqrt(warps) deviations from that.
  float rsigma[kRows], shift[kRows];  // z = (s * rsigma + shift) * weight + bias
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float2* of_warps = &parts[r][lane / 16][team];
    const float about = of_warps[0].x, count = count_of(lane % 16);
    float2 part = of_warps[0];
    if (lane % 16 < warps) part = of_warps[lane % 16];
    const float apart = part.x - about;
    float distance = count * apart, squares = count > 0.0f ? part.y + distance * apart : 0.0f;
    if (!p.is_rms) distance = device::group_sum<16>(distance) * layout.per_column;
    squares = device::group_sum<16>(squares) * layout.per_column - distance * distance;
    const float mean = about + distance;
    rsigma[r] = rsqrtf((squares < 0.0f ? 0.0f : squares) + p.epsilon);  // NaN stays
    if (lane == 16 && warp == 0 && has_row[r]) {
      const int64_t row = entry * p.rows + first + 8 * r;
      if (p.mean) p.mean[row] = mean;
      p.rsigma[row] = rsigma[r];
    }
    rsigma[r] = __shfl_sync(kWarp, rsigma[r], 0);
    shift[r] = -__shfl_sync(kWarp, mean, 0) * rsigma[r];
  }

  // z
  auto* z = at(static_cast<X*>(p.z), own_result);
  auto write_z = [&]<typename W>(W) {
    const auto* weights =
        at(static_cast<const W*>(p.weight.data), entry * p.weight.entry_stride + column);
    const auto* biases =
        at(static_cast<const W*>(p.bias.data), entry * p.bias.entry_stride + column);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!has_column[v]) break;
      float weight[kCols], bias[kCols] = {};
      Raw<W>::load_cached(weights + 32 * kCols * v).widen(weight);
      if (p.bias.data) Raw<W>::load_cached(biases + 32 * kCols * v).widen(bias);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float result[kCols];
#pragma unroll
        for (int i = 0; i < kCols; ++i) {
          result[i] = (s[r][v][i] * rsigma[r] + shift[r]) * weight[i] + bias[i];
        }
        if (has_row[r]) Raw<X>::narrow(result).store(z + offset(r, v));
      }
    }
  };
  if (p.weight_dtype == p.dtype) {
    write_z(X{});
  } else {
    write_z(float{});
  }
}

template <typename X, typename Before>
const char* forward_common(const ForwardParams& p, const Layout& layout, cudaStream_t stream) {
  return launch_common<X, Before>(p, layout, stream, []<typename S>(S, auto has_dropout) {
    return &forward_common_kernel<X, S, has_dropout.value, Before>;
  });
}

}  // namespace jax_flash::norm
