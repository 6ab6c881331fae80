// The backward's second kernel: what its CTAs have summed over rows, added up in a fixed order.
#pragma once

#include "device/element.cuh"
#include "device/sums.cuh"
#include "norm/params.h"

namespace jax_flash::norm {

// result[sum][entry][column] = sum over ctas of partials[sum][entry][cta][column].
struct Sums {
  static constexpr int kColumns = 32, kSplits = 16;  // of a block: a thread has every 16th CTA's
  static constexpr dim3 kBlock{kColumns, kSplits};

  const float* partials;
  void* results[kSums] = {};
  int64_t entries, num_partials, width, tiles;
  int ctas;
  uint32_t* units_done = nullptr;  // of the first kernel: 0 for the next (pace.cuh)
  dim3 grid;

  Sums(const BackwardParams& p, int ctas)
      : partials(p.partials),
        entries(p.entries),
        num_partials(p.num_partials),
        width(p.width),
        tiles((p.width + kColumns - 1) / kColumns),
        ctas(ctas) {
    unsigned num_results = 0;
    for (int i = 0; i < kSums; ++i) {
      if (result_of(p, i) != nullptr) results[num_results++] = result_of(p, i);
    }
    grid = dim3(static_cast<unsigned>(tiles * entries), num_results);
  }
};

// Before::wait() returns when the partial sums are there. Results are rounded once, here: float32
// ones that XLA rounds take a kernel of 1 us each.
template <typename Result, typename Before>
__global__ void sum_kernel(const __grid_constant__ Sums p) {
  constexpr int kAtOnce = 9;  // 144 CTAs with one latency: an H200 has 132
  __shared__ float sums[Sums::kSplits][Sums::kColumns + 1];
  const int64_t entry = blockIdx.x / p.tiles, first = blockIdx.x % p.tiles * Sums::kColumns;
  const int64_t column = first + threadIdx.x;
  const float* from =
      p.partials + (blockIdx.y * p.entries + entry) * p.num_partials * p.width + column;
  Before::wait();
  if (p.units_done != nullptr && blockIdx.x + blockIdx.y + threadIdx.x + threadIdx.y == 0) {
    *p.units_done = 0;
  }
  float sum = 0.0f;
  for (int cta = threadIdx.y; cta < p.ctas; cta += kAtOnce * Sums::kSplits) {
    float x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int other = cta + k * Sums::kSplits;
      x[k] = other < p.ctas && column < p.width ? from[other * p.width] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum += x[k];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // all sums are there

  // Each warp has two of the columns, 16 lanes each
  const int lane = threadIdx.x % Sums::kSplits;
  const int own = threadIdx.y + threadIdx.x / Sums::kSplits * Sums::kSplits;
  const float total = device::group_sum<Sums::kSplits>(sums[lane][own]);
  if (lane == 0 && first + own < p.width) {
    static_cast<Result*>(p.results[blockIdx.y])[entry * p.width + first + own] =
        device::from_float<Result>(total);
  }
}

}  // namespace jax_flash::norm
