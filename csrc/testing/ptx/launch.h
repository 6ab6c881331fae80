// The test-only kernels that run each primitive of csrc/ptx alone: what ffi.cc calls. A launch
// returns nullptr, or what went wrong.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_flash::testing {

// D [128, n] = (accumulate ? C : 0) + A B, with A of 128 rows and `depth` (a multiple of 128)
// summed elements, stored as the operand is: K-major [rows][depth], MN-major [depth][rows].
struct WgmmaProblem {
  bool a_in_registers, transpose_a, transpose_b, accumulate;
  int n, depth;
  int first_byte;  // of the operands in shared memory: descriptors must reach all of it
  const uint16_t *a, *b;
  const float* c;
  float* d;
};
const char* launch_wgmma_bf16(const WgmmaProblem& p, cudaStream_t stream);
const char* launch_wgmma_f16(const WgmmaProblem& p, cudaStream_t stream);

// out [copies, box_rows, 128]: the tile, in logical order, that two boxes of 64 columns at each of
// coordinates [copies, 4] make; what no copy wrote is 0x7fff.
const char* launch_tma_load(const uint16_t* source, const int64_t (&sizes)[4],
                            const int64_t (&strides)[3], int box_rows, int hint,
                            const int32_t* coordinates, int copies, uint16_t* out,
                            cudaStream_t stream);

// The reverse: the tiles of source [copies, box_rows, 128], in logical order, into the array `out`,
// as two boxes of 64 columns at each of coordinates [copies, 4].
const char* launch_tma_store(const uint16_t* source, const int64_t (&sizes)[4],
                             const int64_t (&strides)[3], int box_rows, const int32_t* coordinates,
                             int copies, uint16_t* out, cudaStream_t stream);

// A ring of three stages: source [steps, 256] comes by bulk_load, `sums` [256, 192] is
// sum over steps of source[step, thread % 64 + i], held in 192 registers of each of the 256
// consumers. delay: nanoseconds that the producer (> 0) or the consumers (< 0) lose now and then.
const char* launch_pipeline(const float* source, int steps, int delay, float* sums,
                            cudaStream_t stream);

// total [columns] += sum over all of source [ctas, rounds, columns].
const char* launch_bulk_reduce(const float* source, int ctas, int rounds, int columns, float* total,
                               cudaStream_t stream);

// Each thread stores four sums, adds the other rounds to them and finds them again.
// source: [rounds, columns]; sums, out: [columns].
const char* launch_own_sum(const float* source, int rounds, int columns, float* sums, float* out,
                           cudaStream_t stream);

// matrix [16, 16]: what stmatrix_x4 (or its .trans form) makes of fragments [32, 4]; back
// [32, 4]: what the ldmatrix of the same form reads again.
const char* launch_stmatrix(const uint32_t* fragments, bool transpose, uint16_t* matrix,
                            uint32_t* back, cudaStream_t stream);

// order [3 * rounds]: which of three warpgroups came when, passing the turn by named barriers.
const char* launch_named_barriers(int rounds, int32_t* order, cudaStream_t stream);

// Two kernels, the second launched as programmatic dependent: it raises a flag, waits for the grid
// before it and copies what that wrote. seen [1]: whether the first saw the flag, so that both did
// run at once. scratch: columns + 1 words.
const char* launch_dependent_pair(const float* source, int columns, float* scratch, float* out,
                                  int32_t* seen, cudaStream_t stream);

// total [columns] = the rows of source [ctas, columns] added one after another; turn [1]: ctas.
const char* launch_ordered_sum(const float* source, int ctas, int columns, float* total,
                               int32_t* turn, cudaStream_t stream);

// total [totals, columns], each = the sum of source [ctas, columns], begun with a store by whoever
// comes first; states [totals]: 2.
const char* launch_claimed_sum(const float* source, int ctas, int columns, int totals, float* total,
                               int32_t* states, cudaStream_t stream);

// d [64, n] = 2 x the sum over k < 8 of a [8, 8] (k, row % 8) b [8, n] (k, column): operands whose
// eight rows count twice, and A's eight columns eight times. n: 64 or 128.
const char* launch_repeated_rows(const uint16_t* a, const uint16_t* b, int n, float* d,
                                 cudaStream_t stream);

// out [pairs, rows, 512] = source + constant [4], except for words 0, 4, 8, ..., which stay: each
// row goes from one CTA of a cluster to the other and back.
const char* launch_cluster(const uint32_t* source, const uint32_t* constant, int pairs, int rows,
                           uint32_t* out, cudaStream_t stream);

}  // namespace jax_flash::testing
