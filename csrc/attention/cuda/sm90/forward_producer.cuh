// The first warpgroup of the Hopper forward kernel: the scheduler's warp turns tile numbers into
// jobs, the loader's warp brings what they need. Both run ahead of the consumers as far as the
// rings let them.
#pragma once

#include "attention/cuda/sm90/forward_traits.cuh"

namespace jax_flash::attention::sm90 {

// Zeros and lse = -inf for the rows of a job that sees no key at all. One warp.
template <typename Traits>
__device__ void write_empty_rows(const ForwardParams& p, const typename Traits::Job& job) {
  const int end = min(job.s.first_row + Traits::kBlockM, job.s.query_rows);
  const int chunks = static_cast<int>(p.value_dim / 8), lane = threadIdx.x % 32;
  for (int row = job.s.first_row; row < end; ++row) {
    uint4* chunk = reinterpret_cast<uint4*>(job.o + row * p.o.row_stride);
    for (int i = lane; i < chunks; i += 32) chunk[i] = {};
  }
  for (int row = job.s.first_row + lane; row < end; row += 32) job.lse[row] = -INFINITY;
}

// Fills in the job of a tile; false if the tile has no rows. One warp.
template <typename Traits>
__device__ bool describe_job(const ForwardArguments& a, uint32_t tile, typename Traits::Job& job) {
  using Element = typename Traits::Element;
  const ForwardParams& p = a.p;
  const Work work(a.schedule, tile);
  const BatchIndex batch(p, work.batch);
  if (threadIdx.x % 32 == 0) {
    job.blocks = BlockMask(p.mask, batch, work.head);
    job.head = work.head;
    job.kv_head = work.kv_head;
    job.query_batch = a.q.batch(batch.axis);
    job.key_batch = a.k.batch(batch.axis);
    job.value_batch = a.v.batch(batch.axis);
    job.out_batch = a.o.batch(batch.axis);
    job.is_end = false;
  }
  // NOTE: one thing after another, through shared memory, because this warp has few registers.
  __syncwarp();
  {
    const Sequence s = find_sequence(p, batch, Axis::kQuery, Traits::kBlockM, work.slot);
    if (s.slot_is_empty(Axis::kQuery)) return false;
    if (threadIdx.x % 32 == 0) job.s = s;
  }
  __syncwarp();
  const Sequence& s = job.s;
  if (threadIdx.x % 32 == 0) {
    job.range = key_tiles<Traits::kBlockM, Traits::kBlockN>(s, s.first_row);
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    job.o = element_pointer<Element>(p.o, batch, s.query_start, work.head);
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) job.lse = row_pointer(p.lse, batch, s.query_start, work.head);
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    job.dropout = Dropout(p.dropout, p.num_sequences, batch, s, work.head);
  }
  __syncwarp();  // the job, written by one lane, is visible to all
  return true;
}

// Does a job's description depend on what is in memory?
template <typename Traits>
__device__ bool is_in_memory(const MaskParams& mask) {
  return Traits::kHasDropout || mask.query_lengths.data != nullptr ||
         mask.key_lengths.data != nullptr || mask.causal_offset.data != nullptr ||
         mask.block_mask.data != nullptr;
}

// One warp.
template <typename Traits>
__device__ void schedule_jobs(typename Traits::Smem& smem, const ForwardArguments& a, int team) {
  const bool is_leader = threadIdx.x % 32 == 0;
  // The first job is found while the kernel before this one still runs (forward_kernel).
  const uint32_t first_to_wait = is_in_memory<Traits>(a.p.mask) ? 0 : 1;
  uint32_t jobs = 0;
  for (uint32_t round = 0;; ++round) {
    if (round == first_to_wait) ptx::wait_for_prior_grid();
    if (jobs >= a.lead) {
      const Place<Traits::kJobs> before(jobs - a.lead);
      ptx::mbarrier_wait(smem.job_empty[before.stage], before.parity);
    }
    const uint32_t tile = next_tile(a.counter, round, a.num_tiles, blockIdx.x + team * gridDim.x,
                                    Traits::kTeams * gridDim.x);
    const bool is_end = tile >= a.num_tiles;
    const Place<Traits::kJobs> place(jobs);
    auto& job = smem.job[place.stage];
    if (!is_end) {
      if (!describe_job<Traits>(a, tile, job)) continue;
      const typename Traits::Walk walk(job.range, job.blocks, job.s, smem.window[0]);
      if (walk.first().is_end()) {
        ptx::wait_for_prior_grid();  // that may still read these rows
        write_empty_rows<Traits>(a.p, job);
        __syncwarp();  // nobody reads the job any more when the leader writes the next one
        continue;
      }
    } else if (is_leader) {
      job.is_end = true;
    }
    if (is_leader) ptx::mbarrier_arrive(smem.job_full[place.stage]);
    if (is_end) return;
    ++jobs;
  }
}

// What this lane's warpgroup (lane % 4) sees of the keys [col, col + kBlockN). One warp.
template <typename Traits>
__device__ View view_of(const Sequence& s, const BlockMask& blocks, int col) {
  constexpr int kCols = Traits::kBlockN;
  const int row = s.first_row + static_cast<int>(threadIdx.x % 4) * 64;
  if (!sees_anything<64, kCols>(s, blocks, row, col)) return View::kNothing;
  if (blocks.data != nullptr || row + 63 + s.left > col) return View::kAny;
  const bool is_inside = col + kCols <= s.key_length;
  if (is_inside && row + s.right >= col + kCols - 1) return View::kAll;
  if (!Traits::kHasRoom) return View::kEdge;
  return is_inside && (row + s.right - col) % 16 == 0 ? View::kEdge : View::kAny;
}

// For a Step, from each lane's view. One warp.
__device__ inline uint32_t views_of(View view) {
  return __reduce_or_sync(device::kWarp, static_cast<uint32_t>(view) << threadIdx.x % 4 * 2);
}

// The copies of Q, K and V. K runs one step ahead of V, as the consumers do. NOTE: what copies need
// is at hand before the wait for their place, and a lane is elected where they are issued, so that
// ptxas knows that there is one. Else each is a loop over the lanes and reads the job again: with
// the four of a tile at head dim 256, 5 to 6% of all time (H200, 2026-11-28).
template <typename Traits>
class ForwardLoader {
 public:
  __device__ ForwardLoader(typename Traits::Smem& smem, const ForwardArguments& a)
      : smem_(smem), a_(a) {}

  // One warp.
  __device__ void run() {
    for (uint32_t jobs = 0;; ++jobs) {
      const Place<Traits::kJobs> place_of_job(jobs);
      ptx::mbarrier_wait(smem_.job_full[place_of_job.stage], place_of_job.parity);
      const auto& job = smem_.job[place_of_job.stage];
      if (job.is_end) break;
      if (jobs == 0) ptx::wait_for_prior_grid();
      // The consumers give a Q from shared memory back only when they wait for this V.
      if (!Traits::kFlattened) load_value();
      load_query(job, Place<Traits::kQueryStages>(jobs));
      const typename Traits::Walk walk(job.range, job.blocks, job.s, smem_.window[1]);
      bool is_first = true;
      for (TileStep step = walk.first(); !step.is_end();) {
        const TileStep next = walk.next(step);
        load_key(job, step, is_first, next);
        load_value();
        has_value_ = true;
        const int col = step.tile() * Traits::kBlockN;
        value_ = {job.s.key_start + col, job.kv_head, job.value_batch};
        value_rows_ = job.s.key_length - col;
        step = next;
        is_first = false;
      }
      // Every lane has read the job, and V of its last step needs it no more.
      ptx::mbarrier_arrive(smem_.job_empty[place_of_job.stage]);
    }
    load_value();
    const Key place(keys_);
    ptx::mbarrier_wait(smem_.k_empty[place.stage], place.parity ^ 1);
    if (ptx::elect_one()) {
      smem_.step[place.stage] = Step::end().code();
      ptx::mbarrier_arrive(smem_.k_full[place.stage]);
    }
  }

 private:
  using Key = Place<Traits::kKeyStages>;
  using Value = Place<Traits::kValueStages>;
  struct Origin {  // of a tile in its array
    int row, head, batch;
  };

  template <typename Tile>
  __device__ __forceinline__ static void copy(Tile& tile, const CUtensorMap& map, Origin from,
                                              ptx::Mbarrier& full, ptx::L2Hint hint) {
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      ptx::tma_load(reinterpret_cast<char*>(&tile) + slab * Tile::kSlabBytes, map, full, 64 * slab,
                    from.row, from.head, from.batch, hint);
    }
  }

  __device__ void load_query(const typename Traits::Job& job, Place<Traits::kQueryStages> place) {
    const Origin from{job.s.query_start + job.s.first_row, job.head, job.query_batch};
    auto& tile = smem_.query[place.stage];
    ptx::Mbarrier& full = smem_.q_full[place.stage];
    ptx::mbarrier_wait(smem_.q_empty[place.stage], place.parity ^ 1);
    if (ptx::elect_one()) {
      ptx::mbarrier_arrive_expect(full, sizeof(tile));
      copy(tile, a_.q.map, from, full, ptx::L2Hint::kEvictFirst);
    }
  }
  __device__ void load_key(const typename Traits::Job& job, TileStep step, bool is_first,
                           TileStep next) {
    const int col = step.tile() * Traits::kBlockN;
    const Origin from{job.s.key_start + col, job.kv_head, job.key_batch};
    const Key place(keys_++);
    auto& tile = smem_.key[place.stage];
    ptx::Mbarrier& full = smem_.k_full[place.stage];
    ptx::mbarrier_wait(smem_.k_empty[place.stage], place.parity ^ 1);
    if (ptx::elect_one()) copy(tile, a_.k.map, from, full, ptx::L2Hint::kEvictLast);
    // What the warpgroups see is found while the copy runs; of full tiles nothing is asked.
    uint32_t views = 0, plain_next = !next.is_end() && next.is_full() ? 15 : 0;
    if (!step.is_full()) views = views_of(view_of<Traits>(job.s, job.blocks, col));
    if (Traits::kPlainAlone && !next.is_end() && !next.is_full()) {
      const View view = view_of<Traits>(job.s, job.blocks, next.tile() * Traits::kBlockN);
      plain_next = __ballot_sync(device::kWarp, view == View::kAll) & 15;
    }
    if (ptx::elect_one()) {
      smem_.step[place.stage] = Step(step, is_first, next, views, plain_next).code();
      ptx::mbarrier_arrive_expect(full, sizeof(tile));
    }
  }

  // The V that has not come yet, if any.
  __device__ void load_value() {
    using Tile = typename Traits::ValueTile;
    if (!has_value_) return;
    has_value_ = false;
    const Value place(values_++);
    Tile& tile = smem_.value[place.stage];
    // Rows past the keys that take part, but inside the array, may hold anything, NaN too: 0 times
    // that is no zero.
    const bool is_ragged = value_rows_ < Traits::kBlockN && value_.row + value_rows_ < a_.p.seq_k;
    ptx::Mbarrier& full = is_ragged ? smem_.ragged : smem_.v_full[place.stage];
    ptx::mbarrier_wait(smem_.v_empty[place.stage], place.parity ^ 1);
    if (ptx::elect_one()) {
      ptx::mbarrier_arrive_expect(full, sizeof(Tile));
      copy(tile, a_.v.map, value_, full, ptx::L2Hint::kEvictLast);
    }
    if (is_ragged) {
      ptx::mbarrier_wait(smem_.ragged, ragged_parity_);
      ragged_parity_ ^= 1;
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        char* bytes = reinterpret_cast<char*>(&tile) + slab * Tile::kSlabBytes;
        for (int i = value_rows_ * 128 + threadIdx.x % 32 * 16; i < Tile::kSlabBytes; i += 512) {
          *reinterpret_cast<uint4*>(bytes + i) = {};
        }
      }
      ptx::fence_async_shared();  // wgmma reads the zeros
      __syncwarp();               // of all lanes
      if (ptx::elect_one()) ptx::mbarrier_arrive(smem_.v_full[place.stage]);
    }
  }

  typename Traits::Smem& smem_;
  const ForwardArguments& a_;
  uint32_t keys_ = 0, values_ = 0;  // loaded so far
  // The V of a step that has not come yet: where it lies, and how many of its rows take part.
  bool has_value_ = false;
  Origin value_ = {};
  int value_rows_ = 0;
  uint32_t ragged_parity_ = 0;
};

}  // namespace jax_flash::attention::sm90
