// The copy engine: boxes of a tensor map into swizzled tiles, a ring of bulk copies that wraps its
// mbarriers many times (with registers moved from producer to consumers), and bulk reductions.
#include "device/shared_tile.cuh"
#include "device/tensor_map.h"
#include "ptx/sm90.cuh"
#include "testing/ptx/launch.h"

namespace jax_flash::testing {
namespace {

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__device__ ptx::L2Hint hint_of(int number) {
  return number == 0   ? ptx::L2Hint::kEvictNormal
         : number == 1 ? ptx::L2Hint::kEvictFirst
                       : ptx::L2Hint::kEvictLast;
}

template <int kRows>
__global__ void tma_load_kernel(const __grid_constant__ CUtensorMap map, const int4* coordinates,
                                int hint, uint16_t* out) {
  using Tile = device::SharedTile<kRows, 128>;
  __shared__ Tile tile;
  __shared__ ptx::Mbarrier full;

  // Poison the tile, set up the barrier
  for (int i = threadIdx.x; i < kRows * 128; i += blockDim.x) tile.data[i] = 0x7fff;
  ptx::fence_async_shared();  // the copy engine writes after these stores
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(map);
    ptx::mbarrier_init(full, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();  // the barrier exists, the poison is there

  // Load the boxes side by side
  if (threadIdx.x == 0) {
    const int4 at = coordinates[blockIdx.x];
    ptx::mbarrier_arrive_expect(full, sizeof(Tile));
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      ptx::tma_load(tile.data + slab * Tile::kSlabBytes / 2, map, full, at.x + slab * 64, at.y,
                    at.z, at.w, hint_of(hint));
    }
  }
  ptx::mbarrier_wait(full, 0);
  out += int64_t{blockIdx.x} * kRows * 128;
  for (int i = threadIdx.x; i < kRows * 128; i += blockDim.x) {
    out[i] = tile.data[Tile::offset(i / 128, i % 128) / 2 + i % 8];
  }
}

template <int kRows>
__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, const int4* coordinates,
                                 const uint16_t* source) {
  using Tile = device::SharedTile<kRows, 128>;
  __shared__ Tile tile;
  source += int64_t{blockIdx.x} * kRows * 128;
  for (int i = threadIdx.x; i < kRows * 128; i += blockDim.x) {
    tile.data[Tile::offset(i / 128, i % 128) / 2 + i % 8] = source[i];
  }
  ptx::fence_async_shared();
  __syncthreads();  // the tile is there, for the copy engine too
  if (threadIdx.x == 0) {
    const int4 at = coordinates[blockIdx.x];
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      ptx::tma_store(map, tile.data + slab * Tile::kSlabBytes / 2, at.x + slab * 64, at.y, at.z,
                     at.w);
    }
    ptx::bulk_commit();
    ptx::bulk_wait<0, true>();  // the tile must live until it has been read
  }
}

constexpr int kStages = 3, kColumns = 256, kSums = 192;

// 384 threads at 168 registers: a producer at 24 and two consumers at 240 use the same 64512.
__global__ void __launch_bounds__(384, 1)
    pipeline_kernel(const float* source, int steps, int delay, float* sums) {
  __shared__ alignas(16) float stages[kStages][kColumns];
  __shared__ ptx::Mbarrier full[kStages], empty[kStages];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full[stage], 1);
      ptx::mbarrier_init(empty[stage], 256);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();  // the barriers exist

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages;
        ptx::mbarrier_wait(empty[stage], step / kStages % 2 ^ 1);
        if (delay > 0 && step % 5 == 0) __nanosleep(delay);
        ptx::mbarrier_arrive_expect(full[stage], sizeof(stages[0]));
        ptx::bulk_load(stages[stage], source + int64_t{step} * kColumns, sizeof(stages[0]),
                       full[stage]);
      }
    }
  } else {
    ptx::take_registers<240>();
    const int thread = threadIdx.x - 128;
    float sum[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] = 0;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      ptx::mbarrier_wait(full[stage], step / kStages % 2);
      if (delay < 0 && (step + warpgroup) % 4 == 0) __nanosleep(-delay);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] += stages[stage][thread % 64 + i];
      if (thread % 2 == 0) {
        ptx::mbarrier_arrive(empty[stage]);
      } else {  // of a load that nothing else uses
        ptx::mbarrier_arrive_after(empty[stage], __float_as_uint(stages[stage][thread]));
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[thread * kSums + i] = sum[i];
  }
}

constexpr int kReduceColumns = 512;

__global__ void bulk_reduce_kernel(const float* source, int rounds, int columns, float* total) {
  __shared__ alignas(16) float buffers[2][kReduceColumns];
  source += int64_t{blockIdx.x} * rounds * columns;
  for (int round = 0; round < rounds; ++round) {
    float* const buffer = buffers[round % 2];
    if (threadIdx.x == 0) ptx::bulk_wait<1, true>();
    __syncthreads();  // the copy engine has read this buffer: it may be overwritten
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      buffer[i] = source[int64_t{round} * columns + i];
    }
    ptx::fence_async_shared();
    __syncthreads();       // all stores are visible to the copy engine
    if (round % 3 == 2) {  // every third round without the copy engine
      for (int i = 4 * threadIdx.x; i < columns; i += 4 * blockDim.x) {
        ptx::red_add_4(total + i, {buffer[i], buffer[i + 1], buffer[i + 2], buffer[i + 3]});
      }
    } else if (threadIdx.x == 0) {
      ptx::bulk_reduce_add(total, buffer, columns * sizeof(float));
      ptx::bulk_commit();
    }
  }
  if (threadIdx.x == 0) ptx::bulk_wait<0, false>();
}

// A thread's own sums in global memory: stored, added to, and found again.
__global__ void own_sum_kernel(const float* source, int rounds, int columns, float* sums,
                               float* out) {
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= columns) return;
  const auto row = [&](int round) {
    return *reinterpret_cast<const float4*>(source + int64_t{round} * columns + i);
  };
  *reinterpret_cast<float4*>(sums + i) = row(0);
  for (int round = 1; round < rounds; ++round) {
    const float4 x = row(round);
    ptx::red_add_4(sums + i, {x.x, x.y, x.z, x.w});
  }
  float x[4];
  ptx::load_relaxed_4(sums + i, x);
  *reinterpret_cast<float4*>(out + i) = {x[0], x[1], x[2], x[3]};
}

}  // namespace

const char* launch_tma_load(const uint16_t* source, const int64_t (&sizes)[4],
                            const int64_t (&strides)[3], int box_rows, int hint,
                            const int32_t* coordinates, int copies, uint16_t* out,
                            cudaStream_t stream) {
  CUtensorMap map;
  if (!device::encode_tensor_map(source, true, sizes, strides, box_rows, map)) {
    return "the driver refuses the tensor map";
  }
  const auto* const places = reinterpret_cast<const int4*>(coordinates);
  switch (box_rows) {
    case 8:
      tma_load_kernel<8><<<copies, 128, 0, stream>>>(map, places, hint, out);
      return last_error();
    case 80:
      tma_load_kernel<80><<<copies, 128, 0, stream>>>(map, places, hint, out);
      return last_error();
    case 128:
      tma_load_kernel<128><<<copies, 128, 0, stream>>>(map, places, hint, out);
      return last_error();
  }
  return "box_rows: expected 8, 80 or 128";
}

const char* launch_tma_store(const uint16_t* source, const int64_t (&sizes)[4],
                             const int64_t (&strides)[3], int box_rows, const int32_t* coordinates,
                             int copies, uint16_t* out, cudaStream_t stream) {
  CUtensorMap map;
  if (!device::encode_tensor_map(out, true, sizes, strides, box_rows, map)) {
    return "the driver refuses the tensor map";
  }
  const auto* const places = reinterpret_cast<const int4*>(coordinates);
  switch (box_rows) {
    case 16:
      tma_store_kernel<16><<<copies, 128, 0, stream>>>(map, places, source);
      return last_error();
    case 64:
      tma_store_kernel<64><<<copies, 128, 0, stream>>>(map, places, source);
      return last_error();
  }
  return "box_rows: expected 16 or 64";
}

const char* launch_pipeline(const float* source, int steps, int delay, float* sums,
                            cudaStream_t stream) {
  pipeline_kernel<<<1, 384, 0, stream>>>(source, steps, delay, sums);
  return last_error();
}

const char* launch_bulk_reduce(const float* source, int ctas, int rounds, int columns, float* total,
                               cudaStream_t stream) {
  if (columns > kReduceColumns || columns % 4 != 0) return "columns: expected a multiple of 4";
  bulk_reduce_kernel<<<ctas, 128, 0, stream>>>(source, rounds, columns, total);
  return last_error();
}

const char* launch_own_sum(const float* source, int rounds, int columns, float* sums, float* out,
                           cudaStream_t stream) {
  if (columns % 4 != 0) return "columns: expected a multiple of 4";
  own_sum_kernel<<<(columns + 511) / 512, 128, 0, stream>>>(source, rounds, columns, sums, out);
  return last_error();
}

}  // namespace jax_flash::testing
