// What threads do together: stmatrix against ldmatrix, turns passed by named barriers, and a kernel
// that starts before the one it depends on has ended.
#include "device/shared_tile.cuh"
#include "ptx/sm90.cuh"
#include "testing/ptx/launch.h"

namespace jax_flash::testing {
namespace {

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// One warp. Matrix i of the four is block (i % 2, i / 2) of a 16 x 16 matrix, as in operand A.
__global__ void stmatrix_kernel(const uint32_t* fragments, bool transpose, uint16_t* matrix,
                                uint32_t* back) {
  using Tile = device::SharedTile<16, 64>;
  using Address = device::LdmatrixAddress<Tile>;
  __shared__ Tile tile;
  const Address address(tile, Address::Order::kRowsFirst);
  constexpr int kColumn = 32;  // not the first: the swizzle has something to do
  const int lane = threadIdx.x;
  uint32_t d[4], again[4];
  for (int i = 0; i < 4; ++i) d[i] = fragments[lane * 4 + i];
  if (transpose) {
    ptx::stmatrix_x4_trans(address(0, kColumn), d);
  } else {
    ptx::stmatrix_x4(address(0, kColumn), d);
  }
  __syncwarp();  // the stores of all lanes are there
  for (int i = lane; i < 256; i += 32) {
    matrix[i] = tile.data[Tile::offset(i / 16, kColumn + i % 16) / 2 + i % 8];
  }
  if (transpose) {
    ptx::ldmatrix_x4_trans(again, address(0, kColumn));
  } else {
    ptx::ldmatrix_x4(again, address(0, kColumn));
  }
  for (int i = 0; i < 4; ++i) back[lane * 4 + i] = again[i];
}

constexpr int kGroups = 3;

// Warpgroup w waits at barrier 1 + w, where the one before it arrives without waiting.
__global__ void named_barrier_kernel(int rounds, int32_t* order) {
  __shared__ int turns;
  const int group = threadIdx.x / 128;
  if (threadIdx.x == 0) turns = 0;
  __syncthreads();                                              // the count begins at 0
  if (group == kGroups - 1) ptx::named_barrier_arrive(1, 256);  // the first turn is warpgroup 0's
  for (int round = 0; round < rounds; ++round) {
    ptx::named_barrier_sync(1 + group, 256);
    if (threadIdx.x % 128 < 32 && ptx::elect_one()) {
      order[turns] = group;
      turns = turns + 1;
    }
    if (round + 1 < rounds || group + 1 < kGroups) {
      ptx::named_barrier_arrive(1 + (group + 1) % kGroups, 256);
    }
  }
}

// Lets the next kernel start, waits until it has (or too long), and only then writes.
__global__ void first_kernel(const float* source, int columns, volatile int* started,
                             volatile float* middle, int32_t* seen) {
  ptx::launch_dependents();
  int flag = 0;
  for (int i = 0; i < 100000 && flag == 0; ++i) {
    __nanosleep(100);
    flag = *started;
  }
  for (int i = threadIdx.x; i < columns; i += blockDim.x) middle[i] = source[i] + 1;
  if (threadIdx.x == 0) *seen = flag;
}
__global__ void dependent_kernel(int columns, volatile int* started, const volatile float* middle,
                                 float* out) {
  if (threadIdx.x == 0) *started = 1;
  ptx::wait_for_prior_grid();
  for (int i = threadIdx.x; i < columns; i += blockDim.x) out[i] = middle[i] * 2;
}

}  // namespace

const char* launch_stmatrix(const uint32_t* fragments, bool transpose, uint16_t* matrix,
                            uint32_t* back, cudaStream_t stream) {
  stmatrix_kernel<<<1, 32, 0, stream>>>(fragments, transpose, matrix, back);
  return last_error();
}

const char* launch_named_barriers(int rounds, int32_t* order, cudaStream_t stream) {
  named_barrier_kernel<<<1, 128 * kGroups, 0, stream>>>(rounds, order);
  return last_error();
}

const char* launch_dependent_pair(const float* source, int columns, float* scratch, float* out,
                                  int32_t* seen, cudaStream_t stream) {
  int* const started = reinterpret_cast<int*>(scratch + columns);
  // NOTE: a kernel is loaded when first used, and that waits for the kernels that run.
  cudaFuncAttributes loaded;
  cudaError_t error = cudaFuncGetAttributes(&loaded, dependent_kernel);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = cudaMemsetAsync(scratch, 0, (columns + 1) * sizeof(float), stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  first_kernel<<<1, 128, 0, stream>>>(source, columns, started, scratch, seen);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 128;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error =
      cudaLaunchKernelEx(&config, dependent_kernel, columns, static_cast<volatile int*>(started),
                         static_cast<const volatile float*>(scratch), out);
  return error == cudaSuccess ? last_error() : cudaGetErrorString(error);
}

}  // namespace jax_flash::testing
