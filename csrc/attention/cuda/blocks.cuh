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

  // NOTE: divides; for partial tiles ask once for a row and eight columns, not once an element.
  __device__ bool allows(int i, int j) const {
    return data == nullptr || data[int64_t{i / rows} * num_cols + j / cols] != 0;
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

// Visits the tiles of a range in the order of kStep (+1, -1): next() until it returns kEnd. With
// axis == kQuery the CTA owns the queries and walks over key tiles, else the other way round. All
// lanes of a warp must call next() together; every warp sees the same tiles.
template <int kBlockM, int kBlockN, Axis kOwn, int kStep>
class TileWalk {
 public:
  static constexpr int kEnd = -1;

  // The CTA's own tile starts at s.first_row. NOTE: keeps references, so that what is rarely used
  // can live in shared memory and cost no registers.
  __device__ TileWalk(const TileRange& range, const BlockMask& blocks, const Sequence& s)
      : range_(range),
        blocks_(blocks),
        s_(s),
        has_blocks_(blocks.data != nullptr),
        candidate_(kStep > 0 ? range.begin : range.end - 1) {}
  TileWalk(TileRange&&, const BlockMask&, const Sequence&) = delete;
  TileWalk(const TileRange&, BlockMask&&, const Sequence&) = delete;

  // The next tile; is_full says that it needs no element mask.
  __device__ int next(bool& is_full) {
    if (!has_blocks_) {
      if (!in_range(candidate_)) return kEnd;
      const int tile = candidate_;
      candidate_ += kStep;
      is_full = range_.is_full(tile);
      return tile;
    }
    while (active_ == 0) {
      if (!in_range(candidate_)) return kEnd;
      look_at_32();
    }
    const int bit = __ffs(active_) - 1;
    active_ &= active_ - 1;
    const int tile = window_ + kStep * bit;
    is_full = (full_ >> bit & 1) != 0 && range_.is_full(tile);
    return tile;
  }

 private:
  __device__ bool in_range(int tile) const { return range_.begin <= tile && tile < range_.end; }

  __device__ void look_at_32() {
    window_ = candidate_;
    candidate_ += 32 * kStep;
    const int tile = window_ + kStep * static_cast<int>(threadIdx.x % 32);
    bool any = false, all = false;
    if (in_range(tile)) {
      const int row = kOwn == Axis::kQuery ? s_.first_row : tile * kBlockM;
      const int col = kOwn == Axis::kQuery ? tile * kBlockN : s_.first_row;
      blocks_.classify(row, min(row + kBlockM, s_.query_length), col,
                       min(col + kBlockN, s_.key_length), any, all);
    }
    active_ = __ballot_sync(device::kWarp, any);
    full_ = __ballot_sync(device::kWarp, all);
  }

  const TileRange& range_;
  const BlockMask& blocks_;
  const Sequence& s_;
  bool has_blocks_;
  int candidate_;   // next tile to look at
  int window_ = 0;  // tile of bit 0 of active_
  uint32_t active_ = 0,
           full_ = 0;  // of the 32 tiles from window_ on; active_: those not yet visited
};

}  // namespace jax_flash::attention
