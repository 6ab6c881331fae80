// Plans a call, and launches what it takes: who writes the rows of a compact result, the pass over
// the rows, and the sums of what the CTAs have summed.
#include <initializer_list>

#include "device/vector.cuh"
#include "device/warp.cuh"
#include "norm/cuda/instances.h"
#include "norm/launch.h"

namespace jax_flash::norm {
namespace {

const char* status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool are_aligned(const Problem& p, std::initializer_list<const void*> arrays) {
  return p.width % kCols == 0 && std::all_of(arrays.begin(), arrays.end(), is_16_byte_aligned);
}

// Compact rows ---------------------------------------------------------------------------------

// claims [entries, 2, compact_rows]: both halves are minima over kNobody, the second one of the
// complements.
__global__ void claim_kernel(Array<int32_t> subset, int64_t rows, int64_t compact_rows,
                             Claims* claims) {
  const int64_t entry = blockIdx.y;
  for (int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; row < rows;
       row += int64_t{gridDim.x} * blockDim.x) {
    const int32_t number = subset.data[entry * subset.entry_stride + row];
    if (number < 1 || number > compact_rows) continue;
    Claims* claim = claims + entry * 2 * compact_rows + number - 1;
    atomicMin(claim, static_cast<Claims>(row));
    atomicMin(claim + compact_rows, static_cast<Claims>(~row));
  }
}

// Rows of a compact result that nobody names are zeros.
template <typename Word>
__global__ void clear_kernel(const Claims* claims, int64_t width, Word* result) {
  const int64_t entry = blockIdx.y, compact_rows = gridDim.x;
  if (claims[entry * 2 * compact_rows + blockIdx.x] != kNobody) return;
  Word* row = result + (entry * compact_rows + blockIdx.x) * width;
  for (int64_t column = threadIdx.x; column < width; column += blockDim.x) row[column] = 0;
}

const char* claim(const Problem& p, const Array<int32_t>& subset, int64_t compact_rows,
                  Claims* claims, std::initializer_list<void*> results, cudaStream_t stream) {
  if (subset.data == nullptr || compact_rows == 0) return nullptr;
  if (p.entries > 65535) return "jax_flash: subsets: expected at most 65535 entries under vmap";
  const cudaError_t error =
      cudaMemsetAsync(claims, 0xff, p.entries * 2 * compact_rows * sizeof(Claims), stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto entries = static_cast<unsigned>(p.entries);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((p.rows + 255) / 256, 1024)), entries);
  claim_kernel<<<grid, 256, 0, stream>>>(subset, p.rows, compact_rows, claims);
  const dim3 rows(static_cast<unsigned>(compact_rows), entries);
  for (void* result : results) {
    if (result == nullptr) continue;
    if (p.dtype == DType::kF32) {
      clear_kernel<<<rows, 256, 0, stream>>>(claims, p.width, static_cast<uint32_t*>(result));
    } else {
      clear_kernel<<<rows, 256, 0, stream>>>(claims, p.width, static_cast<uint16_t*>(result));
    }
  }
  return status();
}

// Sums over rows -------------------------------------------------------------------------------

struct Results {
  float* of[kSums];
};

// result[sum][entry][column] = sum over ctas of partials[sum][entry][cta][column], in a fixed
// order: a warp's lanes have 32 columns, and every 32nd CTA's; then each warp adds up one of the
// columns.
constexpr int kSplits = 32, kAtOnce = 8;

__global__ void sum_kernel(const float* partials, const __grid_constant__ Results results,
                           int64_t entries, int64_t num_partials, int ctas, int64_t width) {
  __shared__ float sums[kSplits][kSplits + 1];
  const int64_t tiles = (width + 31) / 32;
  const int64_t entry = blockIdx.x / tiles, first = blockIdx.x % tiles * 32;
  const int64_t column = first + threadIdx.x;
  const float* from = partials + (blockIdx.y * entries + entry) * num_partials * width + column;
  float sum = 0.0f;
  for (int cta = threadIdx.y; cta < ctas; cta += kAtOnce * kSplits) {
    float x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int other = cta + k * kSplits;
      x[k] = other < ctas && column < width ? from[other * width] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum += x[k];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // all warps' sums are there
  const float total = device::warp_sum(sums[threadIdx.x][threadIdx.y]);
  const int64_t own = first + threadIdx.y;
  if (threadIdx.x == 0 && own < width) results.of[blockIdx.y][entry * width + own] = total;
}

const char* sum(const BackwardParams& p, int ctas, cudaStream_t stream) {
  Results results{};
  unsigned num_results = 0;
  for (int i = 0; i < kSums; ++i) {
    if (result_of(p, i) != nullptr) results.of[num_results++] = result_of(p, i);
  }
  const dim3 grid(static_cast<unsigned>((p.width + 31) / 32 * p.entries), num_results);
  sum_kernel<<<grid, dim3(32, kSplits), 0, stream>>>(p.partials, results, p.entries, p.num_partials,
                                                     ctas, p.width);
  return status();
}

bool may_be_common(const Problem& p) {
  return p.width <= kCommonWidth && p.entries <= kCommonEntries && !p.weight1.data &&
         !p.layerscale.data && !p.rowscale.data && !p.x_subset.data && !p.out_subset.data;
}

// Vectors of 8 columns a thread: wide rows give every thread more to do between barriers.
int num_vectors(int64_t width, int wide) { return width > 2 * kCols * kMaxThreads ? wide : 2; }

}  // namespace

const char* launch_norm_forward(const ForwardParams& p, cudaStream_t stream) {
  Wishes wishes;
  wishes.is_aligned = are_aligned(
      p, {p.x.data, p.x1.data, p.residual.data, p.weight.data, p.bias.data, p.weight1.data,
          p.bias1.data, p.layerscale.data, p.z, p.z1, p.stream, p.mask, p.mask1});
  if (may_be_common(p) && wishes.is_aligned && p.x.data && !p.x1.data && !p.mask) {
    return device::visit(p.dtype, [&]<typename X>() { return forward_common<X>(p, stream); });
  }
  wishes.operands[0] = {p.x, p.dtype, p.x_subset.data ? Operand::kCompactX : Operand::kStream};
  wishes.operands[1] = {p.x1, p.dtype, Operand::kStream};
  wishes.operands[2] = {p.residual, p.stream_dtype, Operand::kStream};
  wishes.vectors = num_vectors(p.width, kForwardWideVectors);
  Plan plan;
  if (const char* error = make_plan(p, wishes, plan)) return error;
  if (const char* error = claim(p, p.out_subset, p.out_rows, p.claims, {p.z, p.z1}, stream)) {
    return error;
  }
  return device::visit(p.dtype, [&]<typename X>() { return forward<X>(p, plan, stream); });
}

const char* launch_norm_backward(const BackwardParams& p, cudaStream_t stream) {
  Wishes wishes;
  wishes.is_aligned =
      are_aligned(p, {p.stream.data, p.dz.data, p.dz1.data, p.dstream.data, p.x.data, p.weight.data,
                      p.weight1.data, p.layerscale.data, p.dx, p.dx1, p.dresidual, p.partials});
  if (may_be_common(p) && wishes.is_aligned && !p.dx1) {
    Layout layout;
    if (const char* error = backward_layout(p, layout)) return error;
    if (layout.stages > 0) {
      const char* error = device::visit(
          p.dtype, [&]<typename X>() { return backward_common<X>(p, layout, stream); });
      return error ? error : sum(p, layout.ctas, stream);
    }
  }
  const auto z_rows = p.out_subset.data ? Operand::kCompactZ : Operand::kStream;
  wishes.operands[0] = {p.stream, p.stream_dtype, Operand::kStream};
  wishes.operands[1] = {p.dz, p.dtype, z_rows};
  wishes.operands[2] = {p.dstream, p.stream_dtype, Operand::kStream};
  wishes.operands[3] = {p.dz1, p.dtype, z_rows};
  wishes.operands[4] = {p.x, p.dtype, p.x_subset.data ? Operand::kCompactX : Operand::kStream};
  wishes.vectors = num_vectors(p.width, kBackwardWideVectors);
  if (wishes.vectors > 2) wishes.max_threads = kMaxThreads / 2;
  wishes.num_sums = (p.dweight1 != nullptr) + (p.dbias1 != nullptr) + (p.dlayerscale != nullptr);
  wishes.joins_teams = true;
  wishes.min_stages = 2;
  wishes.max_stages = 3;
  wishes.max_ctas = p.num_partials;
  Plan plan;
  if (const char* error = make_plan(p, wishes, plan)) return error;
  if (const char* error = claim(p, p.x_subset, p.x_rows, p.claims, {p.dx}, stream)) return error;
  const char* error =
      device::visit(p.dtype, [&]<typename X>() { return backward<X>(p, plan, stream); });
  return error ? error : sum(p, plan.ctas, stream);
}

}  // namespace jax_flash::norm
