// What an instruction set offers: the same source (isa/) compiled once for each, reached through
// this table, which is chosen once per call.
#pragma once

#include <string>

#include "attention/cpu/sequences.h"
#include "attention/params.h"

namespace jax_flash::attention::cpu {

// Scratch sizes are in bytes; scratch and accumulators are 64-byte aligned and hold garbage at the
// start of a call unless said otherwise. Accumulators are float32 [round_up(len_k, 8)][stride].
struct Kernels {
  // Rows of queries that one task should cover.
  int64_t (*forward_tile)(const Problem& p, int64_t len_q);
  int64_t (*forward_scratch)(const ForwardParams& p);
  // O and lse of query rows [begin, begin + rows) of one sequence, for `heads` query heads of one
  // kv head: one where there is dropout or a block mask.
  void (*forward)(const ForwardParams& p, const Sequence& sequence, int64_t head, int64_t heads,
                  int64_t begin, int64_t rows, void* scratch);

  int64_t (*backward_tile)(const Problem& p, int64_t len_q);
  int64_t (*backward_scratch)(const BackwardParams& p);
  int64_t (*accumulator_stride)(int64_t dim);
  // dQ of these query rows, and what they add to dK and dV of their kv head.
  void (*backward)(const BackwardParams& p, const Sequence& sequence, int64_t head, int64_t begin,
                   int64_t rows, void* scratch, float* dk, float* dv);
  // dK and dV of key rows [begin, begin + rows), from the sum of `parts` accumulators that lie
  // `part_stride` floats apart, dk before dv.
  void (*store_key_gradients)(const BackwardParams& p, const Sequence& sequence, int64_t kv_head,
                              int64_t begin, int64_t rows, float* dk, float* dv, int64_t parts,
                              int64_t part_stride);
};

// The fastest table for this CPU and dtype, or the one that the environment variable
// JAX_FLASH_CPU_ISA asks for: baseline, avx2, avx512 or avx512_bf16 (which serves bfloat16, and
// means avx512 for the other types). Returns nullptr with `problem` set where that cannot be had.
const Kernels* choose_kernels(DType dtype, std::string& problem);

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif

}  // namespace jax_flash::attention::cpu
