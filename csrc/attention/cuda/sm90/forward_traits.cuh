// Shapes, shared memory and messages of the Hopper forward kernel (forward.cuh).
#pragma once

#include "attention/cuda/blocks.cuh"
#include "attention/cuda/dropout.cuh"
#include "attention/cuda/instances.h"
#include "attention/cuda/scheduler.cuh"
#include "attention/cuda/sm90/operand_map.h"
#include "attention/cuda/sm90/pipeline.cuh"
#include "attention/cuda/sm90/tile_counter.cuh"
#include "device/opaque.cuh"
#include "device/shared_tile.cuh"

namespace jax_flash::attention::sm90 {

// What a warpgroup of 64 queries sees of a tile of keys that is not full for all of them.
enum class View : uint32_t {
  kNothing,
  kAny,   // anything: look at every element
  kEdge,  // each row from the first column up to some column. Where there is room for it
          // (ForwardTraits::kHasRoom): each 16 rows some blocks of 16 columns and a triangle
  kAll,
};

// A tile of keys on its way from the loader to the consumers, in one word.
class Step {
 public:
  static constexpr int64_t kMaxTiles = (1 << 17) - 1;

  __device__ explicit Step(uint32_t code) : code_(code) {}
  // `views`: a View for each warpgroup, two bits each. `plain_next`: for each, one bit, whether the
  // next step is of the same job and shows it everything.
  __device__ Step(TileStep step, bool is_first, TileStep next, uint32_t views, uint32_t plain_next)
      : code_(static_cast<uint32_t>(step.tile()) << 15 | views << 7 | plain_next << 3 |
              (is_first ? 4 : 0) | (next.is_end() ? 2 : 0) | (step.is_full() ? 1 : 0)) {}
  __device__ static Step end() { return Step(kEnd); }
  __device__ bool is_end() const { return code_ == kEnd; }
  __device__ int tile() const { return static_cast<int>(code_ >> 15); }
  __device__ bool is_first() const { return (code_ & 4) != 0; }  // of its job
  __device__ bool is_last() const { return (code_ & 2) != 0; }
  __device__ bool is_full() const { return (code_ & 1) != 0; }  // for all warpgroups
  // Is the next step of the same job, and does it show the warpgroup everything?
  __device__ bool is_before_plain(int warpgroup) const {
    return (code_ >> (3 + warpgroup) & 1) != 0;
  }
  __device__ View view(int warpgroup) const {
    return is_full() ? View::kAll : static_cast<View>(code_ >> (7 + 2 * warpgroup) & 3);
  }
  __device__ uint32_t code() const { return code_; }

 private:
  static constexpr uint32_t kEnd = ~0u << 15;  // a tile that does not exist, and no flag

  uint32_t code_;
};

// What the instance files choose.
template <int kHeadDim_, int kValueDim_, int kConsumers_, int kBlockN_, int kKeyStages_,
          int kValueStages_, bool kQueryInRegisters_, int kQueryStages_, int kTeams_ = 1>
struct ForwardTiles {
  static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
  static constexpr int kConsumers = kConsumers_;  // warpgroups of 64 queries
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kKeyStages = kKeyStages_, kValueStages = kValueStages_;
  static constexpr bool kQueryInRegisters = kQueryInRegisters_;
  static constexpr int kQueryStages = kQueryStages_;  // Q in shared memory
  // Sets of so many consumers in a CTA, each with jobs, rings and a loader of its own.
  static constexpr int kTeams = kTeams_;
};

template <typename Element_, typename Tiles, bool kHasDropout_>
struct ForwardTraits : Tiles {
  using Element = Element_;
  static constexpr bool kHasDropout = kHasDropout_;
  static constexpr int kBlockM = 64 * Tiles::kConsumers;
  static constexpr int kWarpgroups = Tiles::kConsumers * Tiles::kTeams;  // that consume
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // The first S of a job may run under the last P V of the one before where two Q are there at a
  // time: one in registers and one in shared memory, or two in shared memory.
  static constexpr bool kFlattened = Tiles::kQueryInRegisters || Tiles::kQueryStages > 1;
  // Registers. The pool is what the threads have at launch: 65536 / kThreads each, rounded down to
  // a multiple of 8.
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : kWarpgroups == 3 ? 160 : 112;
  static_assert(2 <= kWarpgroups && kWarpgroups <= 4);
  static_assert(Tiles::kTeams <= 2);  // a loader and a scheduler each, of four warps
  static constexpr int kJobs = 4;     // at most that a CTA has taken and not finished

  static constexpr int kFragmentsN = Tiles::kBlockN / 8, kFragmentsV = Tiles::kValueDim / 8;
  using QueryTile = device::SharedTile<kBlockM, (Tiles::kHeadDim + 63) / 64 * 64>;
  using KeyTile = device::SharedTile<Tiles::kBlockN, (Tiles::kHeadDim + 63) / 64 * 64>;
  using ValueTile = device::SharedTile<Tiles::kBlockN, (Tiles::kValueDim + 63) / 64 * 64>;
  // Are there registers to spare for the faster way through the diagonal?
  static constexpr bool kHasRoom = kWarpgroups == 2;
  // May a warpgroup take a tile as plain that is not full for the others? Under turns they wait for
  // each other anyway.
  static constexpr bool kPlainAlone = Tiles::kTeams > 1;
  // bf16 begins a job with a guess (RowSoftmax::try_first).
  static constexpr bool kGuesses = std::is_same_v<Element, __nv_bfloat16>;
  // How O leaves (forward_output.cuh): by the copy engine, as lines of 128 bytes, or straight from
  // the accumulators. With the last, ptxas keeps no descriptor in uniform registers at head dim 256
  // (286 instructions a step for 248); with the others it spills where registers are few.
  static constexpr bool kCopiesOutput = kHasRoom && Tiles::kHeadDim <= 128;
  static constexpr bool kWritesLines = Tiles::kHeadDim > 128;
  // O on its way out: 16 rows of a warp.
  using OutputTile = device::SharedTile<16, kWritesLines ? 64 : (Tiles::kValueDim + 63) / 64 * 64>;
  using Walk = TileWalk<kBlockM, Tiles::kBlockN, Axis::kQuery, -1>;

  // A tile of queries of one head. In shared memory, because the main loop rarely looks at it.
  struct Job {
    Sequence s;
    TileRange range;
    BlockMask blocks;
    Dropout dropout;
    Element* o;  // row 0 of the sequence, this head
    float* lse;
    int head, kv_head;
    int query_batch, key_batch, value_batch, out_batch;  // coordinates of the tensor maps
    bool is_end;                                         // no job: the last message
  };
  struct Smem {  // of a team
    QueryTile query[Tiles::kQueryStages];
    KeyTile key[Tiles::kKeyStages];
    ValueTile value[Tiles::kValueStages];
    OutputTile output[kCopiesOutput || kWritesLines ? 4 * Tiles::kConsumers : 1];  // one a warp
    Job job[kJobs];
    typename Walk::Window window[2];   // of the scheduler, of the loader
    uint32_t step[Tiles::kKeyStages];  // Step::code of what key[] holds
    float alpha[kBlockM];              // what a row of O is to be multiplied by
    // With dropout: what the calls for a column of 16 x 16 blocks have in common, four a block.
    PhiloxColumn columns[kHasDropout ? Tiles::kKeyStages : 1][kHasDropout ? Tiles::kBlockN / 4 : 1];
    ptx::Mbarrier job_full[kJobs], job_empty[kJobs];
    ptx::Mbarrier q_full[Tiles::kQueryStages], q_empty[Tiles::kQueryStages];
    ptx::Mbarrier k_full[Tiles::kKeyStages], k_empty[Tiles::kKeyStages];
    ptx::Mbarrier v_full[Tiles::kValueStages], v_empty[Tiles::kValueStages];
    ptx::Mbarrier ragged;  // a V whose last rows the loader still has to clear
  };
  static_assert(Tiles::kTeams * sizeof(Smem) <= 227 * 1024);
};

// The calling warp's first row in the tile of queries. NOTE: opaque, so that what rare branches
// make of it is not computed ahead of the main loop, and then spilled.
__device__ inline int row_of_warp(int warpgroup) {
  return 64 * warpgroup + static_cast<int>(device::opaque(threadIdx.x) % 128 / 32 * 16);
}

struct ForwardArguments {
  ForwardParams p;
  Schedule schedule;
  uint32_t num_tiles;
  bool guesses;   // may a job begin with a guess? Where there are teams
  uint32_t lead;  // jobs that a CTA has taken and not finished, at most
  int counter;    // of tile_counter.cuh; negative: team t of n takes tiles t, t + n, t + 2 n, ...
  OperandMap q, k, v, o;
  float scale_log2;
  uint32_t zero;    // that the compiler does not know to be one
  bool ends_alone;  // the last P V of a job does not wait for the first K of the next
};

}  // namespace jax_flash::attention::sm90
