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

// One warp.
template <typename Traits>
__device__ void schedule_jobs(typename Traits::Smem& smem, const ForwardArguments& a) {
  const bool is_leader = threadIdx.x % 32 == 0;
  uint32_t jobs = 0;
  for (uint32_t round = 0;; ++round) {
    if (jobs >= a.lead) {
      const Place<Traits::kJobs> before(jobs - a.lead);
      ptx::mbarrier_wait(smem.job_empty[before.stage], before.parity);
    }
    const uint32_t tile = next_tile(a.counter, round, a.num_tiles);
    const bool is_end = tile >= a.num_tiles;
    const Place<Traits::kJobs> place(jobs);
    auto& job = smem.job[place.stage];
    if (!is_end) {
      if (!describe_job<Traits>(a, tile, job)) continue;
      const typename Traits::Walk walk(job.range, job.blocks, job.s, smem.window[0]);
      if (walk.first().is_end()) {
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

// What each warpgroup sees of the keys [col, col + kBlockN), for a Step. One warp, a lane for each
// warpgroup.
template <int kBlockN>
__device__ uint32_t views_of(const Sequence& s, const BlockMask& blocks, int col) {
  const int row = s.first_row + static_cast<int>(threadIdx.x % 4) * 64;
  const bool is_seen = sees_anything<64, kBlockN>(s, blocks, row, col);
  const bool is_diagonal = blocks.data == nullptr && col + kBlockN <= s.key_length &&
                           row + 63 + s.left <= col && (row + s.right - col) % 16 == 0;
  const View view = !is_seen ? View::kNothing : is_diagonal ? View::kDiagonal : View::kAny;
  const uint32_t shifted = static_cast<uint32_t>(view) << threadIdx.x % 4 * 2;
  return __reduce_or_sync(device::kWarp, shifted);
}

// The copies of Q, K and V. K runs one step ahead of V, as the consumers do.
template <typename Traits>
class ForwardLoader {
 public:
  __device__ ForwardLoader(typename Traits::Smem& smem, const ForwardArguments& a)
      : smem_(smem), a_(a), is_leader_(threadIdx.x % 32 == 0) {}

  // One warp.
  __device__ void run() {
    for (uint32_t jobs = 0;; ++jobs) {
      const Place<Traits::kJobs> place(jobs);
      ptx::mbarrier_wait(smem_.job_full[place.stage], place.parity);
      const auto& job = smem_.job[place.stage];
      if (job.is_end) break;
      // The consumers give a Q from shared memory back only when they wait for this V.
      if (!Traits::kFlattened) load_value();
      const Place<Traits::kQueryStages> query(jobs);
      ptx::mbarrier_wait(smem_.q_empty[query.stage], query.parity ^ 1);
      if (is_leader_) load_query(job, query.stage);
      const typename Traits::Walk walk(job.range, job.blocks, job.s, smem_.window[1]);
      bool is_first = true;
      for (TileStep step = walk.first(); !step.is_end();) {
        const TileStep next = walk.next(step);
        const Key place(keys_++);
        ptx::mbarrier_wait(smem_.k_empty[place.stage], place.parity ^ 1);
        load_key(job, step, is_first, next, place.stage);
        load_value();
        const int col = step.tile() * Traits::kBlockN;
        value_row_ = job.s.key_start + col;
        value_head_ = job.kv_head;
        value_batch_ = job.value_batch;
        value_valid_ = job.s.key_length - col;
        step = next;
        is_first = false;
      }
    }
    load_value();
    const Key place(keys_);
    ptx::mbarrier_wait(smem_.k_empty[place.stage], place.parity ^ 1);
    if (is_leader_) {
      smem_.step[place.stage] = Step::end().code();
      ptx::mbarrier_arrive(smem_.k_full[place.stage]);
    }
  }

 private:
  using Key = Place<Traits::kKeyStages>;
  using Value = Place<Traits::kValueStages>;

  __device__ void load_query(const typename Traits::Job& job, int stage) {
    using Tile = typename Traits::QueryTile;
    Tile& tile = smem_.query[stage];
    ptx::Mbarrier& full = smem_.q_full[stage];
    ptx::mbarrier_arrive_expect(full, sizeof(Tile));
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      ptx::tma_load(reinterpret_cast<char*>(&tile) + slab * Tile::kSlabBytes, a_.q.map, full,
                    64 * slab, job.s.query_start + job.s.first_row, job.head, job.query_batch,
                    ptx::L2Hint::kEvictFirst);
    }
  }
  __device__ void load_key(const typename Traits::Job& job, TileStep step, bool is_first,
                           TileStep next, int stage) {
    using Tile = typename Traits::KeyTile;
    Tile& tile = smem_.key[stage];
    ptx::Mbarrier& full = smem_.k_full[stage];
    const int col = step.tile() * Traits::kBlockN;
    if (is_leader_) {
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        ptx::tma_load(reinterpret_cast<char*>(&tile) + slab * Tile::kSlabBytes, a_.k.map, full,
                      64 * slab, job.s.key_start + col, job.kv_head, job.key_batch,
                      ptx::L2Hint::kEvictLast);
      }
    }
    uint32_t views = 0;  // found while the copy runs
    if (!step.is_full()) views = views_of<Traits::kBlockN>(job.s, job.blocks, col);
    if (is_leader_) {
      smem_.step[stage] = Step(step, is_first, next, views).code();
      ptx::mbarrier_arrive_expect(full, sizeof(Tile));
    }
  }

  // The V of the last step whose V has not come yet, if any.
  __device__ void load_value() {
    using Tile = typename Traits::ValueTile;
    if (value_row_ < 0) return;
    const Value place(values_++);
    ptx::mbarrier_wait(smem_.v_empty[place.stage], place.parity ^ 1);
    Tile& tile = smem_.value[place.stage];
    // Rows past the keys that take part, but inside the array, may hold anything, NaN too: 0 times
    // that is no zero.
    const bool is_ragged = value_valid_ < Traits::kBlockN && value_row_ + value_valid_ < a_.p.seq_k;
    ptx::Mbarrier& full = is_ragged ? smem_.ragged : smem_.v_full[place.stage];
    if (is_leader_) {
      ptx::mbarrier_arrive_expect(full, sizeof(Tile));
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        ptx::tma_load(reinterpret_cast<char*>(&tile) + slab * Tile::kSlabBytes, a_.v.map, full,
                      64 * slab, value_row_, value_head_, value_batch_, ptx::L2Hint::kEvictLast);
      }
    }
    if (is_ragged) {
      ptx::mbarrier_wait(smem_.ragged, ragged_parity_);
      ragged_parity_ ^= 1;
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        char* bytes = reinterpret_cast<char*>(&tile) + slab * Tile::kSlabBytes;
        for (int i = value_valid_ * 128 + threadIdx.x % 32 * 16; i < Tile::kSlabBytes; i += 512) {
          *reinterpret_cast<uint4*>(bytes + i) = {};
        }
      }
      ptx::fence_async_shared();  // wgmma reads the zeros
      __syncwarp();               // of all lanes
      if (is_leader_) ptx::mbarrier_arrive(smem_.v_full[place.stage]);
    }
    value_row_ = -1;
  }

  typename Traits::Smem& smem_;
  const ForwardArguments& a_;
  const bool is_leader_;
  uint32_t keys_ = 0, values_ = 0;  // loaded so far
  int value_row_ = -1, value_head_ = 0, value_batch_ = 0;
  int value_valid_ = 0;  // rows of it that take part
  uint32_t ragged_parity_ = 0;
};

}  // namespace jax_flash::attention::sm90
