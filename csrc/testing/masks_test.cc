// Checks, on the host, every answer that the CUDA kernels take from blocks.cuh and mask.cuh against
// the definition, pair by pair: which tiles are visited, which are full, which rows a warp may
// skip, and the element mask of a partial tile. Random lengths, bands and block masks. Prints the
// number of mistakes; run by tests/test_cuda_masks.py.
// clang-format off: the language that the kernels' headers need comes before them
#include "testing/host/cuda_on_host.h"
// clang-format on
#include <cstdio>
#include <random>
#include <vector>

#include "attention/cuda/mask.cuh"

namespace jax_flash::attention {
namespace {

constexpr int kBlockM = 128, kBlockN = 64, kWarpM = 32, kMaxRows = 400, kMaxCols = 500;

class Check {
 public:
  explicit Check(int seed) : random_(seed) {}

  void one_problem() {
    Sequence s;
    s.query_length = number(1, kMaxRows);
    s.key_length = number(1, kMaxCols);
    s.left = number(0, 2) ? number(-300, 50) : -(1 << 30);
    s.right = number(0, 2) ? number(-50, 300) : 1 << 30;
    const Problem p;
    BlockMask blocks(p.mask, BatchIndex(p, 0), 0);
    std::vector<uint8_t> bits(kMaxRows / 16 * kMaxCols);
    const int density = number(0, 4);
    for (uint8_t& bit : bits) bit = number(0, 3) < density;
    if (number(0, 1)) {
      blocks.data = bits.data();
      blocks.rows = 16 * number(1, 8);
      blocks.cols = 16 * number(1, 16);
      blocks.num_cols = (kMaxCols + blocks.cols - 1) / blocks.cols;
    }
    s.first_row = kBlockM * number(0, (s.query_length - 1) / kBlockM);
    const TileRange keys = key_tiles<kBlockM, kBlockN>(s, s.first_row);
    for (int tile = 0; (tile - 1) * kBlockN < s.key_length; ++tile) {
      if (!one_tile(s, keys, tile, s.first_row, tile * kBlockN)) continue;
      for (int warp = 0; warp < kBlockM / kWarpM; ++warp) {
        one_warp(s, blocks, s.first_row + warp * kWarpM, tile * kBlockN);
      }
    }
    const int first_col = kBlockN * number(0, (s.key_length - 1) / kBlockN);
    const TileRange queries = query_tiles<kBlockM, kBlockN>(s, first_col);
    for (int tile = 0; (tile - 1) * kBlockM < s.query_length; ++tile) {
      one_tile(s, queries, tile, tile * kBlockM, first_col);
    }
  }

  long mistakes = 0, masked = 0, skipped = 0, full = 0;  // the last three: that the test tests

 private:
  int number(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  // Is the tile visited? Rows past query_length do not matter to key_tiles, all else does.
  bool one_tile(const Sequence& s, const TileRange& range, int tile, int row, int col) {
    bool any = false, all = true;
    for (int i = row; i < min(row + kBlockM, s.query_length); ++i) {
      for (int j = col; j < col + kBlockN; ++j) {
        any |= s.allows(i, j);
        all &= s.allows(i, j);
      }
    }
    const bool is_visited = range.begin <= tile && tile < range.end;
    mistakes += any && !is_visited;
    mistakes += is_visited && range.is_full(tile) && !all;
    full += is_visited && range.is_full(tile);
    return is_visited;
  }

  void one_warp(const Sequence& s, const BlockMask& blocks, int row, int col) {
    const auto is_allowed = [&](int i, int j) { return s.allows(i, j) && blocks.allows(i, j); };
    bool any = false;
    for (int i = row; i < min(row + kWarpM, s.query_length); ++i) {
      for (int j = col; j < col + kBlockN; ++j) any |= is_allowed(i, j);
    }
    const bool sees = sees_anything<kWarpM, kBlockN>(s, blocks, row, col);
    mistakes += any && !sees;
    skipped += !sees;
    for (int lane = 0; lane < 32; lane += 5) {
      threadIdx.x = lane;
      float rS[kWarpM / 16][kBlockN / 8][4];
      std::fill_n(&rS[0][0][0], kWarpM * kBlockN / 32, 1.0f);
      mask_scores(rS, s, blocks, row, col);
      for (int m = 0; m < kWarpM / 16; ++m) {
        for (int n = 0; n < kBlockN / 8; ++n) {
          for (int e = 0; e < 4; ++e) {
            const int i = row + 16 * m + lane / 4 + 8 * (e / 2),
                      j = col + 8 * n + 2 * (lane % 4) + e % 2;
            if (i >= s.query_length) continue;
            mistakes += (rS[m][n][e] == 1.0f) != is_allowed(i, j);
            masked += rS[m][n][e] != 1.0f;
          }
        }
      }
    }
  }

  std::mt19937 random_;
};

}  // namespace
}  // namespace jax_flash::attention

int main() {
  jax_flash::attention::Check check(1);
  for (int i = 0; i < 2000; ++i) check.one_problem();
  std::printf("mistakes %ld masked %ld skipped %ld full %ld\n", check.mistakes, check.masked,
              check.skipped, check.full);
  return check.mistakes == 0 && check.masked > 0 && check.skipped > 0 && check.full > 0 ? 0 : 1;
}
