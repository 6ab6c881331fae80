#include "attention/cpu/schedule.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "attention/cpu/kernels.h"
#include "common/parallel.h"

namespace jax_flash::attention::cpu {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
constexpr int64_t num_tiles(int64_t rows, int64_t tile) { return (rows + tile - 1) / tile; }

// 64-byte aligned memory of one worker, uninitialised.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(::operator new(bytes, kAlignment)) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() { return data_; }
  float* floats() { return static_cast<float*>(data_); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* data_;
};

// Probabilities and their gradients fall through the denormal range all the time, and many CPUs
// take a hundred cycles for each: count them as zero, as XLA does, while a worker runs.
class FlushDenormals {
#if defined(__SSE2__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#else
 public:
  FlushDenormals() {}
#endif
};

// Fills the rows of a [rows, heads, dim] view that no sequence owns with zeros.
void fill_gaps(const Tensor& view, int64_t item_bytes, int64_t heads, int64_t dim,
               const std::vector<Gap>& gaps) {
  for (const Gap& gap : gaps) {
    int64_t offset = 0;
    for (int axis = 0; axis < kBatchDims; ++axis) {
      offset += gap.batch[axis] * view.batch.stride[axis];
    }
    for (int64_t row = gap.begin; row < gap.end; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = offset + row * view.row_stride + head * view.head_stride;
        std::memset(static_cast<char*>(view.data) + at * item_bytes, 0, dim * item_bytes);
      }
    }
  }
}

void fill_gaps(const Rows& view, int64_t heads, const std::vector<Gap>& gaps) {
  for (const Gap& gap : gaps) {
    for (int64_t head = 0; head < heads; ++head) {
      float* rows = view.data + head * view.head_stride;
      for (int axis = 0; axis < kBatchDims; ++axis) {
        rows += gap.batch[axis] * view.batch.stride[axis];
      }
      std::fill(rows + gap.begin, rows + gap.end, -std::numeric_limits<float>::infinity());
    }
  }
}

// Few queries would leave most lanes of a vector empty: heads that share K and V fill a panel.
int64_t heads_per_task(const Problem& p, int64_t len_q) {
  if (p.dropout.threshold > 0 || p.mask.block_mask.data != nullptr) return 1;
  constexpr int64_t kPanel = 48;
  const int64_t group = p.heads / p.kv_heads;
  int64_t heads = std::clamp<int64_t>(kPanel / std::max<int64_t>(len_q, 1), 1, group);
  while (group % heads != 0) --heads;
  return heads;
}

}  // namespace

// One task a (sequence, head or few heads, tile of queries). Later tiles of a causal head see more
// keys: they go first, so that no thread is left with a long one at the end.
ffi::Error run_forward(const ForwardParams& p, ffi::ThreadPool& pool) {
  std::string problem;
  const Kernels* kernels = choose_kernels(p.dtype, problem);
  if (kernels == nullptr) return ffi::Error::InvalidArgument(problem);
  const Sequences sequences = find_sequences(p);
  fill_gaps(p.o, item_bytes(p.dtype), p.heads, p.value_dim, sequences.query_gaps);
  fill_gaps(p.lse, p.heads, sequences.query_gaps);

  // first_task[s]: how many tasks the sequences before s have.
  std::vector<int64_t> first_task = {0};
  for (const Sequence& sequence : sequences.list) {
    const int64_t tile = kernels->forward_tile(p, std::max<int64_t>(sequence.len_q, 1));
    first_task.push_back(first_task.back() + p.heads / heads_per_task(p, sequence.len_q) *
                                                 num_tiles(sequence.len_q, tile));
  }
  return run_tasks(pool, first_task.back(), [&](Tasks& tasks) {
    const FlushDenormals flush;
    Buffer scratch(kernels->forward_scratch(p));
    for (int64_t task; tasks.next(task);) {
      const auto after = std::upper_bound(first_task.begin(), first_task.end(), task);
      const Sequence& sequence = sequences.list[after - first_task.begin() - 1];
      const int64_t tile = kernels->forward_tile(p, sequence.len_q);
      const int64_t tiles = num_tiles(sequence.len_q, tile), local = task - *(after - 1);
      const int64_t begin = (tiles - 1 - local % tiles) * tile;
      const int64_t heads = heads_per_task(p, sequence.len_q);
      kernels->forward(p, sequence, local / tiles * heads, heads, begin,
                       std::min(tile, sequence.len_q - begin), scratch.data());
    }
  });
}

// A unit is one kv head of one sequence: the query tiles of all its heads add to the same dK and
// dV. Where there are units enough, a task is a unit; else each unit is split into `parts` tasks
// with accumulators of their own, which take every parts-th tile (so that causal heads balance),
// and a second round sums them. Either way the order of additions is fixed: the same call gives the
// same bits.
ffi::Error run_backward(const BackwardParams& p, ffi::ThreadPool& pool) {
  std::string problem;
  const Kernels* kernels = choose_kernels(p.dtype, problem);
  if (kernels == nullptr) return ffi::Error::InvalidArgument(problem);
  const Sequences sequences = find_sequences(p);
  fill_gaps(p.dq, item_bytes(p.dtype), p.heads, p.head_dim, sequences.query_gaps);
  fill_gaps(p.dk, item_bytes(p.dtype), p.kv_heads, p.head_dim, sequences.key_gaps);
  fill_gaps(p.dv, item_bytes(p.dtype), p.kv_heads, p.value_dim, sequences.key_gaps);

  const int64_t units = static_cast<int64_t>(sequences.list.size()) * p.kv_heads;
  if (units == 0) return ffi::Error::Success();
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t parts = units >= 4 * threads ? 1 : threads / std::gcd(units, threads);
  const int64_t group = p.heads / p.kv_heads;

  int64_t longest = 0;
  for (const Sequence& sequence : sequences.list) longest = std::max(longest, sequence.len_k);
  const int64_t key_rows = round_up(longest, 8);
  const int64_t dk_floats = key_rows * kernels->accumulator_stride(p.head_dim);
  const int64_t part_floats = dk_floats + key_rows * kernels->accumulator_stride(p.value_dim);

  // Adds the tiles part, part + parts, ... of a unit to zeroed accumulators.
  const auto add_part = [&](int64_t unit, int64_t part, void* scratch, float* sums) {
    const Sequence& sequence = sequences.list[unit / p.kv_heads];
    const int64_t kv_head = unit % p.kv_heads;
    std::memset(sums, 0, part_floats * sizeof(float));
    if (sequence.len_q == 0) return;
    const int64_t tile = kernels->backward_tile(p, sequence.len_q);
    const int64_t tiles = num_tiles(sequence.len_q, tile);
    for (int64_t i = part; i < group * tiles; i += parts) {
      const int64_t begin = i % tiles * tile;
      kernels->backward(p, sequence, kv_head * group + i / tiles, begin,
                        std::min(tile, sequence.len_q - begin), scratch, sums, sums + dk_floats);
    }
  };
  const auto store = [&](int64_t unit, int64_t begin, int64_t rows, float* sums) {
    const Sequence& sequence = sequences.list[unit / p.kv_heads];
    rows = std::min(rows, sequence.len_k - begin);
    if (rows <= 0) return;
    kernels->store_key_gradients(p, sequence, unit % p.kv_heads, begin, rows, sums,
                                 sums + dk_floats, parts, part_floats);
  };

  if (parts == 1) {
    return run_tasks(pool, units, [&](Tasks& tasks) {
      const FlushDenormals flush;
      Buffer scratch(kernels->backward_scratch(p)), sums(part_floats * sizeof(float));
      for (int64_t unit; tasks.next(unit);) {
        add_part(unit, 0, scratch.data(), sums.floats());
        store(unit, 0, longest, sums.floats());
      }
    });
  }
  std::unique_ptr<Buffer> sums;
  try {
    sums = std::make_unique<Buffer>(units * parts * part_floats * sizeof(float));
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "jax_flash: no memory left for the partial dK and dV");
  }
  const auto sums_of = [&](int64_t task) { return sums->floats() + task * part_floats; };
  ffi::Error error = run_tasks(pool, units * parts, [&](Tasks& tasks) {
    const FlushDenormals flush;
    Buffer scratch(kernels->backward_scratch(p));
    for (int64_t task; tasks.next(task);) {
      add_part(task / parts, task % parts, scratch.data(), sums_of(task));
    }
  });
  if (error.failure()) return error;
  constexpr int64_t kRows = 256;  // of keys a task of the second round
  const int64_t blocks = num_tiles(longest, kRows);
  return run_tasks(pool, units * blocks, [&](Tasks& tasks) {
    const FlushDenormals flush;
    for (int64_t task; tasks.next(task);) {
      const int64_t unit = task / blocks;
      store(unit, task % blocks * kRows, kRows, sums_of(unit * parts));
    }
  });
}

}  // namespace jax_flash::attention::cpu
