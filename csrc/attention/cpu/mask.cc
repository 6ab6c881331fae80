#include "attention/cpu/mask.h"

#include <algorithm>
#include <utility>

namespace jax_flash::attention::cpu {

void make_query_tile(const Problem& p, const Sequence& sequence, int64_t head, int heads,
                     int64_t begin, int rows, int lanes, QueryTile& tile) {
  const MaskParams& mask = p.mask;
  tile.mask = &mask;
  tile.begin = begin;
  tile.heads = heads;
  tile.rows = rows;
  tile.lanes = lanes;
  tile.blocks = mask.block_mask.data;
  if (tile.blocks != nullptr) {
    for (int axis = 0; axis < kBatchDims; ++axis) {
      tile.blocks += sequence.batch[axis] * mask.block_mask.batch.stride[axis];
    }
    tile.blocks += head * mask.block_head_stride;
  }
  const auto clamp = [&](int64_t j) {
    return static_cast<int32_t>(std::clamp<int64_t>(j, 0, sequence.len_k));
  };
  for (int lane = 0; lane < lanes; ++lane) {
    const int query = std::min(lane, rows - 1) % (rows / heads);
    const int64_t aligned = begin + query + sequence.diagonal;
    tile.first[lane] = clamp(aligned - mask.window_left);
    tile.end[lane] = clamp(aligned + mask.window_right + 1);
  }
}

namespace {

// Of the lanes of [lane_begin, lane_end): the keys that one of them may see, and those that all do.
struct Reach {
  KeyRange any, all;
};

Reach reach_of(const QueryTile& tile, int lane_begin, int lane_end) {
  const auto [first_least, first_most] =
      tile.heads == 1 ? std::pair(tile.first + lane_begin, tile.first + lane_end - 1)
                      : std::minmax_element(tile.first + lane_begin, tile.first + lane_end);
  const auto [end_least, end_most] =
      tile.heads == 1 ? std::pair(tile.end + lane_begin, tile.end + lane_end - 1)
                      : std::minmax_element(tile.end + lane_begin, tile.end + lane_end);
  return {{*first_least, *end_most}, {*first_most, *end_least}};
}

}  // namespace

KeyRange visible_keys(const QueryTile& tile, int lane_begin, int lane_end) {
  return reach_of(tile, lane_begin, lane_end).any;
}

TileKind ask(const QueryTile& tile, int lane_begin, int lane_end, KeyRange keys) {
  const auto [visible, seen_by_all] = reach_of(tile, lane_begin, lane_end);
  if (std::max(keys.begin, visible.begin) >= std::min(keys.end, visible.end)) {
    return TileKind::kSkip;
  }
  const bool is_inside = seen_by_all.begin <= keys.begin && keys.end <= seen_by_all.end;
  if (tile.blocks == nullptr) return is_inside ? TileKind::kFull : TileKind::kPartial;

  const MaskParams& mask = *tile.mask;
  const int64_t last_query = tile.begin + std::min(lane_end, tile.rows) - 1;
  const int64_t last_key = std::min(keys.end, visible.end) - 1;
  bool any = false, all = true;
  for (int64_t row = (tile.begin + std::min(lane_begin, tile.rows - 1)) / mask.block_rows;
       row <= last_query / mask.block_rows; ++row) {
    for (int64_t col = std::max(keys.begin, visible.begin) / mask.block_cols;
         col <= last_key / mask.block_cols; ++col) {
      const bool is_on = tile.blocks[row * mask.num_block_cols + col] != 0;
      any = any || is_on;
      all = all && is_on;
    }
  }
  if (!any) return TileKind::kSkip;
  return all && is_inside ? TileKind::kFull : TileKind::kPartial;
}

int64_t allowed_lanes(const QueryTile& tile, int64_t j, int32_t* allowed) {
  const MaskParams& mask = *tile.mask;
  const int64_t last_col = mask.num_block_cols - 1;
  const int64_t col = std::min(j / mask.block_cols, last_col);
  for (int lane = 0; lane < tile.lanes; ++lane) {
    const int64_t row = (tile.begin + std::min(lane, tile.rows - 1)) / mask.block_rows;
    allowed[lane] = tile.blocks[row * mask.num_block_cols + col] != 0 ? -1 : 0;
  }
  // Past the last column lies nothing but a tile's padding, which `end` hides.
  return col == last_col ? INT64_MAX : (col + 1) * mask.block_cols;
}

}  // namespace jax_flash::attention::cpu
