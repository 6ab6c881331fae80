// The threads that share a row, the rows they go through, and which columns each of them holds.
#pragma once

#include "device/sums.cuh"
#include "norm/cuda/plan.h"
#include "ptx/sm80.cuh"

namespace jax_flash::norm {

using device::kWarp;

// Waits for the warps of a team; the CTA's barrier 0 is __syncthreads'.
__device__ __forceinline__ void sync_team(int team, int warps) {
  if (warps == 1) {
    __syncwarp();
  } else {
    ptx::named_barrier_sync(1 + team, 32 * warps);
  }
}

// Until the oldest of the `stages` groups of copies that this thread has started is there.
__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages == 1) {
    ptx::cp_async_wait<0>();
  } else if (stages == 2) {
    ptx::cp_async_wait<1>();
  } else if (stages == 3) {
    ptx::cp_async_wait<2>();
  } else {
    ptx::cp_async_wait<3>();
  }
}

struct Team {
  int threads, warps, lane;
  int index;         // of the team in the CTA
  int warp, thread;  // in the team

  __device__ explicit Team(const Plan& plan)
      : threads(plan.team_threads), warps(plan.team_threads / 32), lane(threadIdx.x % 32) {
    const int warp_of_cta = device::uniform(static_cast<int>(threadIdx.x) / 32);
    index = warp_of_cta / warps;
    warp = warp_of_cta % warps;
    thread = 32 * warp + lane;
  }

  __device__ __forceinline__ void sync() const { sync_team(index, warps); }
  // First column of this thread's vector v.
  __device__ __forceinline__ int column(int v) const { return kCols * (thread + v * threads); }
};

// Columns from `column` on: of a vector's 8, those below it exist; none where it is not positive.
// NOTE: not clamped to 0..8. ptxas 13.0 takes the comparison of max(0, min(n, 8)) with 8 from the
// predicate of VIMNMX.RELU; with that, LayerNorm of unaligned rows was wrong on an H200.
__device__ __forceinline__ int columns_left(int64_t width, int column) {
  return static_cast<int>(width) - column;
}

// One row, or two, that a team works on at once.
struct Unit {
  int row[2];              // -1: none
  bool is_repeat = false;  // only its row of the compact result is wanted
  bool adds = false;       // to what is there
};

__device__ __forceinline__ Unit unit_at(const Plan& plan, int rows, int index) {
  if (!plan.is_paired) return {{index, -1}};
  const int first = index / 8 * 16 + index % 8;
  return {{first, first + 8 < rows ? first + 8 : -1}};
}

// A result whose rows are named by a subset. A row that several rows name (only a traced subset
// can) is written by one team alone, in the order of those rows, after all others.
struct Placement {
  const int32_t* subset = nullptr;  // [rows]: number of the compact row plus 1; nullptr: row r is r
  const Claims* claims = nullptr;   // [2, compact rows]; nullptr: rows are only read
  int compact_rows = 0;

  __device__ __forceinline__ Placement(const Array<int32_t>& subsets, const Claims* all_claims,
                                       int64_t compact_rows, int64_t entry)
      : compact_rows(static_cast<int>(compact_rows)) {
    if (subsets.data == nullptr) return;
    subset = subsets.data + entry * subsets.entry_stride;
    claims = all_claims + entry * 2 * compact_rows;
  }

  __device__ __forceinline__ int named(int row) const {
    if (subset == nullptr) return row;
    const int number = subset[row];
    return number >= 1 && number <= compact_rows ? number - 1 : -1;
  }
  __device__ __forceinline__ bool is_repeated(int compact) const {
    return claims[compact] != kNobody && first_row(compact) != last_row(compact);
  }
  __device__ __forceinline__ int first_row(int compact) const { return claims[compact]; }
  __device__ __forceinline__ int last_row(int compact) const {
    return ~claims[compact_rows + compact];
  }
  // Where the unit's row goes, or -1.
  __device__ __forceinline__ int target(const Unit& unit, int row) const {
    const int compact = named(row);
    if (subset == nullptr || compact < 0 || unit.is_repeat) return compact;
    return is_repeated(compact) ? -1 : compact;
  }
};

// The numbers of a unit's rows in the random counters, read a unit ahead.
struct RowIds {
  uint32_t id[2] = {0, 0};

  __device__ __forceinline__ void read(const Problem& p, int64_t entry, const Unit& unit) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      id[r] = p.row_ids.data[entry * p.row_ids.entry_stride + max(unit.row[r], 0)];
    }
  }
  // Whether the second row's draws come from the calls of the first.
  __device__ __forceinline__ bool share_draws() const { return (id[0] ^ id[1]) == 8; }
};

__device__ __forceinline__ float scale_of_row(const Problem& p, int64_t entry, int row) {
  return p.rowscale.data[entry * p.rowscale.entry_stride + row];
}

// All units of a team: its share of the pairs, then of the rows that are named repeatedly.
class Walk {
 public:
  __device__ Walk(const Plan& plan, int rows, int first, int step)
      : plan_(plan), rows_(rows), step_(step), next_(first), compact_(first) {}

  __device__ __forceinline__ bool next(Unit& unit, const Placement& placement) {
    if (next_ < plan_.units) {
      unit = unit_at(plan_, rows_, next_);
      next_ += step_;
      return true;
    }
    if (placement.subset == nullptr) return false;
    return next_repeat(unit, placement);
  }
  // The unit `ahead` steps after the last one, if it is one of the pairs.
  __device__ __forceinline__ bool peek(int ahead, Unit& unit) const {
    const int index = next_ + (ahead - 1) * step_;
    if (index >= plan_.units) return false;
    unit = unit_at(plan_, rows_, index);
    return true;
  }

 private:
  __device__ bool next_repeat(Unit& unit, const Placement& placement) {
    for (; compact_ < placement.compact_rows; compact_ += step_, row_ = -1) {
      if (!placement.is_repeated(compact_)) continue;
      const int first = placement.first_row(compact_), last = placement.last_row(compact_);
      for (row_ = row_ < 0 ? first : row_ + 1; row_ <= last; ++row_) {
        if (placement.named(row_) != compact_) continue;
        unit = {{row_, -1}, /*is_repeat=*/true, /*adds=*/row_ != first};
        return true;
      }
    }
    return false;
  }

  const Plan& plan_;
  int rows_, step_, next_, compact_, row_ = -1;
};

}  // namespace jax_flash::norm
