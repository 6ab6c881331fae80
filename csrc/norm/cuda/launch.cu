// Plans a call, and launches what it takes: who writes the rows of a compact result, the pass over
// the rows, and the sums of what the CTAs have summed.
#include <initializer_list>

#include "device/architecture.h"
#include "device/vector.cuh"
#include "norm/cuda/instances.h"
#include "norm/cuda/sums.cuh"
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

// Of a backward on this device; 0 between them.
__device__ uint32_t units_done_now;

const char* sum(const BackwardParams& p, int ctas, cudaStream_t stream,
                uint32_t* units_done = nullptr) {
  if (device::runs_sm90_kernels()) return sum_as_dependent(p, ctas, units_done, stream);
  const Sums sums(p, ctas);
  device::visit(p.sums_dtype, [&]<typename Result>() {
    sum_kernel<Result, Nothing><<<sums.grid, Sums::kBlock, 0, stream>>>(sums);
  });
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
    Layout layout;
    if (const char* error = forward_layout(p, layout)) return error;
    if (layout.fits) {
      return device::visit(p.dtype, [&]<typename X>() {
        return device::runs_sm90_kernels() ? forward_common<X, PriorGrid>(p, layout, stream)
                                           : forward_common<X, Nothing>(p, layout, stream);
      });
    }
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
    if (layout.fits) {
      const bool is_hopper = device::runs_sm90_kernels();
      if (is_hopper && layout.may_pace) {
        const cudaError_t error =
            cudaGetSymbolAddress(reinterpret_cast<void**>(&layout.units_done), units_done_now);
        if (error != cudaSuccess) return cudaGetErrorString(error);
      }
      const char* error = device::visit(p.dtype, [&]<typename X>() {
        return is_hopper ? backward_common<X, PriorGrid>(p, layout, stream)
                         : backward_common<X, Nothing>(p, layout, stream);
      });
      return error ? error : sum(p, layout.ctas, stream, layout.units_done);
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
