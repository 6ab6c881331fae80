// The one question that all masks answer: which tiles does a CTA visit, and which of them need no
// element mask? Lengths, causal and window make a contiguous range of tiles with a contiguous full
// part inside; a block mask thins it out, 32 candidates at a time.
#pragma once

#include "attention/cuda/seqlen.cuh"

namespace jax_flash::attention {

// Tiles [begin, end) hold an allowed pair; those in [full_begin, full_end) hold nothing else.
struct TileRange {
  int begin, end;
  int full_begin, full_end;

  __device__ bool is_full(int tile) const { return full_begin <= tile && tile < full_end; }
};

__device__ inline TileRange tile_range(int64_t first, int64_t last, int64_t full_first,
                                       int64_t full_last, int64_t length, int block) {
  TileRange range;
  first = max(first, int64_t{0});
  last = min(last, length - 1);
  full_first = max(full_first, int64_t{0});
  full_last = min(full_last, length - 1);
  range.begin = static_cast<int>(min(first, length) / block);
  range.end = last < first ? range.begin : static_cast<int>(last / block) + 1;
  range.full_begin = static_cast<int>(min(full_first + block - 1, length + block) / block);
  range.full_end = full_last < 0 ? 0 : static_cast<int>((full_last + 1) / block);
  return range;
}

// Key tiles of kBlockN that query rows [row, row + kBlockM) see. Rows past query_length do not
// count: the forward kernel throws them away.
template <int kBlockM, int kBlockN>
__device__ TileRange key_tiles(const Sequence& s, int row) {
  const int64_t first_row = row, last_row = min(row + kBlockM, s.query_length) - 1;
  if (last_row < first_row) return {0, 0, 0, 0};
  return tile_range(first_row + s.left, last_row + s.right, last_row + s.left, first_row + s.right,
                    s.key_length, kBlockN);
}

// Query tiles of kBlockM that see key rows [col, col + kBlockN). A tile that reaches past
// query_length is partial, and so is every tile where the keys reach past key_length.
template <int kBlockM, int kBlockN>
__device__ TileRange query_tiles(const Sequence& s, int col) {
  const int64_t first_col = col, last_col = min(col + kBlockN, s.key_length) - 1;
  if (last_col < first_col) return {0, 0, 0, 0};
  TileRange range = tile_range(first_col - s.right, last_col - s.left, last_col - s.right,
                               first_col - s.left, s.query_length, kBlockM);
  if (col + kBlockN > s.key_length) range.full_end = range.full_begin;
  return range;
}

// The block mask of one (batch entry, head).
struct BlockMask {
  const uint8_t* data;  // [num_block_rows, num_block_cols], or nullptr: everything is allowed
  int rows, cols, num_cols;

  __device__ BlockMask(const MaskParams& mask, const BatchIndex& batch, int head)
      : data(batch.of(mask.block_mask)),
        rows(mask.block_rows),
        cols(mask.block_cols),
        num_cols(mask.num_block_cols) {
    if (data != nullptr) data += head * mask.block_head_stride;
  }

  // NOTE: divides; a partial tile asks for 16 rows and eight columns at a time (column_groups).
  __device__ bool allows(int i, int j) const {
    return data == nullptr || data[int64_t{i / rows} * num_cols + j / cols] != 0;
  }
  // Bit n: the block of row i and columns [col + 8 n, col + 8 n + 8) is there, for those of the kN
  // groups that begin before `length`. Rows i..i+15 with i a multiple of 16 have the same answer.
  template <int kN>
  __device__ uint32_t column_groups(int i, int col, int length) const {
    static_assert(kN < 32);
    const uint8_t* block_row = data + int64_t{i / rows} * num_cols;
    const int end = min(col + 8 * kN, length);
    uint32_t groups = 0;
    for (int c = col / cols; c * cols < end; ++c) {
      const int first = max(c * cols - col, 0) / 8, last = min((c + 1) * cols - col, 8 * kN) / 8;
      if (block_row[c] != 0) groups |= (1u << last) - (1u << first);
    }
    return groups;
  }
  // Looks at every block that meets rows [i, i_end) and columns [j, j_end), neither empty.
  __device__ void classify(int i, int i_end, int j, int j_end, bool& any, bool& all) const {
    any = false;
    all = true;
    for (int r = i / rows; r <= (i_end - 1) / rows; ++r) {
      for (int c = j / cols; c <= (j_end - 1) / cols; ++c) {
        const bool bit = data[int64_t{r} * num_cols + c] != 0;
        any |= bit;
        all &= bit;
      }
    }
  }
};

// Do query rows [row, row + kRows) see any of the keys [col, col + kCols)? A warp skips what it
// cannot see of a tile that others see. row is a multiple of 16.
template <int kRows, int kCols>
__device__ bool sees_anything(const Sequence& s, const BlockMask& blocks, int row, int col) {
  const int end_row = min(row + kRows, s.query_length), end_col = min(col + kCols, s.key_length);
  if (row >= end_row || col > end_row - 1 + s.right || end_col - 1 < row + s.left) return false;
  if (blocks.data == nullptr) return true;
  for (int i = row; i < end_row; i += 16) {
    if (blocks.column_groups<kCols / 8>(i, col, s.key_length) != 0) return true;
  }
  return false;
}

// A tile on the way, and whether it needs no element mask: one register.
class TileStep {
 public:
  __device__ TileStep(int tile, bool is_full) : code_(tile * 2 + (is_full ? 1 : 0)) {}
  __device__ static TileStep end() { return {-1, false}; }
  __device__ bool is_end() const { return code_ < 0; }
  __device__ int tile() const { return code_ >> 1; }
  __device__ bool is_full() const { return (code_ & 1) != 0; }

 private:
  int code_;
};

// Visits the tiles of a range in the order of kStep (+1 or -1). With kOwn == kQuery the CTA owns
// queries from row s.first_row on and walks over key tiles, else the other way round. All lanes of
// a warp must call first() and next() together; every warp sees the same tiles. NOTE: everything is
// kept by reference, to be in shared memory: without a block mask a walk then costs no registers.
template <int kBlockM, int kBlockN, Axis kOwn, int kStep>
class TileWalk {
 public:
  // Where a warp stands in the block mask: the tiles from `first` on, one bit each. One a warp.
  struct Window {
    int first;
    uint32_t active, full;  // active: those not yet visited
  };

  __device__ TileWalk(const TileRange& range, const BlockMask& blocks, const Sequence& s,
                      Window& window)
      : range_(range), blocks_(blocks), s_(s), window_(window) {}
  TileWalk(TileRange&&, const BlockMask&, const Sequence&, Window&) = delete;
  TileWalk(const TileRange&, BlockMask&&, const Sequence&, Window&) = delete;

  __device__ TileStep first() const {
    const int tile = kStep > 0 ? range_.begin : range_.end - 1;
    if (blocks_.data == nullptr) return plain(tile);
    return next_active({tile - 32 * kStep, 0, 0});
  }
  __device__ TileStep next(TileStep step) const {
    if (blocks_.data == nullptr) return plain(step.tile() + kStep);
    return next_active(window_);
  }

 private:
  __device__ bool in_range(int tile) const { return range_.begin <= tile && tile < range_.end; }

  __device__ TileStep plain(int tile) const {
    return in_range(tile) ? TileStep(tile, range_.is_full(tile)) : TileStep::end();
  }

  __device__ TileStep next_active(Window window) const {
    while (window.active == 0) {
      window.first += 32 * kStep;
      if (!in_range(window.first)) return TileStep::end();
      look_at_32(window);
    }
    const int bit = __ffs(window.active) - 1;
    window.active &= window.active - 1;
    __syncwarp();  // every lane has read the old window
    window_ = window;
    __syncwarp();  // and will read the new one
    const int tile = window.first + kStep * bit;
    return {tile, (window.full >> bit & 1) != 0 && range_.is_full(tile)};
  }

  __device__ void look_at_32(Window& window) const {
    const int tile = window.first + kStep * static_cast<int>(threadIdx.x % 32);
    bool any = false, all = false;
    if (in_range(tile)) {
      const int row = kOwn == Axis::kQuery ? s_.first_row : tile * kBlockM;
      const int col = kOwn == Axis::kQuery ? tile * kBlockN : s_.first_row;
      blocks_.classify(row, min(row + kBlockM, s_.query_length), col,
                       min(col + kBlockN, s_.key_length), any, all);
    }
    window.active = __ballot_sync(device::kWarp, any);
    window.full = __ballot_sync(device::kWarp, all);
  }

  const TileRange& range_;
  const BlockMask& blocks_;
  const Sequence& s_;
  Window& window_;
};

}  // namespace jax_flash::attention
