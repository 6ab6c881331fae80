// The kernels of one instruction set: compiled once for each with its own flags and JAX_FLASH_ISA.
#include "attention/cpu/kernels.h"

#include "attention/cpu/isa/backward.h"
#include "attention/cpu/isa/forward.h"

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {
namespace {

// Queries a task covers: whole panels, but no more than one row of the block mask, so that a tile
// is skipped wherever the mask says so.
int64_t tile_rows(const Problem& p, int64_t len_q, int64_t most_rows) {
  int64_t rows = most_rows;
  if (p.mask.block_mask.data != nullptr && p.mask.block_rows % 16 == 0) {
    rows = p.mask.block_rows < most_rows ? p.mask.block_rows
                                         : (p.mask.block_rows % 128 == 0 ? 128 : 64);
  }
  return least(rows, round_up(len_q, 16));
}

constexpr int64_t kForwardRows = 192, kBackwardRows = 128;

int64_t forward_rows(const Problem& p, int64_t len_q) { return tile_rows(p, len_q, kForwardRows); }
int64_t backward_rows(const Problem& p, int64_t len_q) {
  return tile_rows(p, len_q, kBackwardRows);
}
int64_t forward_scratch(const ForwardParams& p) {
  return ForwardScratch(p, kForwardRows, nullptr).arena.used();
}
int64_t backward_scratch(const BackwardParams& p) {
  return BackwardScratch(p, kBackwardRows, nullptr).arena.used();
}
int64_t accumulator_stride(int64_t dim) { return round_up(dim, kLanes); }

}  // namespace

extern const Kernels kKernels = {forward_rows,  forward_scratch,    forward_tile,
                                 backward_rows, backward_scratch,   accumulator_stride,
                                 backward_tile, store_key_gradients};

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
