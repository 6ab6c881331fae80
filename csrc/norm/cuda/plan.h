// How a call with any options is laid over the GPU (layout.h: the common call). Host code, and the
// arithmetic that kernels share with it.
//
// A team of threads works on a pair of rows, r and r + 8 of a block of 16: those share their random
// draws (common/philox.h). A thread holds 8 neighbouring columns of each row, or kVectors times 8.
// A CTA is one team or several, and goes through the pairs with the stride of all teams.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "norm/params.h"

namespace jax_flash::norm {

inline constexpr int kCols = 8;          // neighbouring columns of a thread
inline constexpr int kMaxThreads = 512;  // of a CTA, one of which fills an SM: 128 registers each
inline constexpr int kMaxOperands = 5;   // arrays of rows that a kernel reads

// An array of rows that a kernel copies into shared memory, and where its rows lie there.
struct Operand {
  enum Rows : int32_t { kStream, kCompactX, kCompactZ };  // which rows: numbered by which subset

  const char* data = nullptr;  // nullptr: off
  int64_t entry_bytes = 0;
  int32_t item_bytes = 0;
  Rows rows = kStream;
  uint32_t offset = 0;  // in a warp's part of a stage

  Operand() = default;
  Operand(const Array<void>& array, DType dtype, Rows rows)
      : data(static_cast<const char*>(array.data)),
        entry_bytes(array.entry_stride * ::jax_flash::item_bytes(dtype)),
        item_bytes(array.data ? static_cast<int32_t>(::jax_flash::item_bytes(dtype)) : 0),
        rows(rows) {}
};

struct Plan {
  int vectors = 1;                  // of 8 columns, in a thread
  int team_threads = 0, teams = 0;  // threads of a team, teams of a CTA
  int ctas = 0;                     // of one entry
  int units = 0;                    // pairs, or rows, of one entry
  bool is_paired = true;            // else a unit is one row: two do not fit into shared memory
  bool is_aligned = true;           // every row starts at a multiple of 16 bytes
  int stages = 0;                   // units whose rows lie in shared memory, or are on their way
  uint32_t warp_bytes = 0;          // a warp's part of one of them
  uint32_t stage_bytes = 0;         // of one team
  uint32_t stages_bytes = 0;        // of all stages of all teams, first in shared memory
  uint32_t sums_bytes = 0;          // of one row of f32 columns, of one team
  int num_sums = 0;                 // such rows that each team keeps after the stages
  Operand operands[kMaxOperands];
};

// Rows that a thread holds at once: a pair of wide ones would not fit into its registers.
template <int kVectors>
inline constexpr int kRowsOfUnit = kVectors > 2 ? 1 : 2;

inline int64_t num_units(int64_t rows, bool is_paired) {
  return is_paired ? rows / 16 * 8 + std::min<int64_t>(rows % 16, 8) : rows;
}

struct Device {
  int sms = 0, shared_bytes = 0;  // shared memory that a CTA may have

  const char* read() {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
      error =
          cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

inline bool is_16_byte_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// What one kernel asks of its plan.
struct Wishes {
  Operand operands[kMaxOperands];
  int vectors = 1;
  int max_threads = kMaxThreads;
  bool is_aligned = true;
  int num_sums = 0;          // rows of f32 columns that each team keeps in shared memory
  bool joins_teams = false;  // the teams of a CTA add up such a row at the end
  int min_stages = 1, max_stages = 2;
  int64_t max_ctas = INT64_MAX;  // of one entry
};

inline const char* make_plan(const Problem& p, const Wishes& wishes, Plan& plan) {
  Device device;
  if (const char* error = device.read()) return error;
  std::copy_n(wishes.operands, kMaxOperands, plan.operands);
  const int vectors = plan.vectors = wishes.vectors;
  const int64_t threads = (p.width + kCols * vectors - 1) / (kCols * vectors);
  plan.team_threads = static_cast<int>((threads + 31) / 32 * 32);
  plan.is_aligned = wishes.is_aligned;
  const int64_t columns = int64_t{plan.team_threads} * vectors * kCols;
  plan.sums_bytes = static_cast<uint32_t>(4 * columns);
  plan.num_sums = wishes.num_sums;

  // As many teams as fit and have something to do; there are 15 named barriers.
  const int most_rows = vectors > 2 ? kRowsOfUnit<4> : kRowsOfUnit<1>;
  const int64_t units = num_units(p.rows, most_rows == 2) * p.entries;
  int64_t teams = std::max(1, wishes.max_threads / plan.team_threads);

  if (plan.team_threads > 32) teams = std::min<int64_t>(teams, 15);
  teams = std::max<int64_t>(1, std::min(teams, units / device.sms));

  // Pairs of rows where enough of them fit beside each other, else single rows.
  const int64_t static_bytes = 2048;
  auto fits = [&](int64_t with_teams, int rows, int min_stages) {
    plan.warp_bytes = 0;
    for (Operand& operand : plan.operands) {
      operand.offset = plan.warp_bytes;
      plan.warp_bytes += 32 * kCols * vectors * rows * operand.item_bytes;
    }
    plan.stage_bytes = plan.warp_bytes * (plan.team_threads / 32);
    plan.is_paired = rows == 2;
    plan.teams = static_cast<int>(with_teams);
    const int64_t kept = static_bytes + with_teams * plan.sums_bytes * plan.num_sums;
    const int64_t stages = (device.shared_bytes - kept) / with_teams / plan.stage_bytes;
    plan.stages = static_cast<int>(std::min<int64_t>(stages, wishes.max_stages));
    return plan.stages >= min_stages;
  };
  bool found = false;
  for (int64_t n = teams; n > 0 && !found; --n) found = fits(n, most_rows, wishes.min_stages);
  if (!found && !fits(1, 1, wishes.min_stages) && !fits(1, 1, 1)) {
    return "jax_flash: a row of the norm does not fit into this GPU's shared memory";
  }
  plan.stages_bytes = plan.teams * plan.stages * plan.stage_bytes;
  if (wishes.joins_teams) {
    plan.stages_bytes = std::max(plan.stages_bytes, plan.teams * plan.sums_bytes);
  }
  plan.units = static_cast<int>(num_units(p.rows, plan.is_paired));
  const int64_t wanted = (int64_t{plan.units} + plan.teams - 1) / plan.teams;
  const int64_t share = std::max<int64_t>(1, (device.sms + p.entries - 1) / p.entries);
  plan.ctas = static_cast<int>(std::min({wanted, share, wishes.max_ctas}));
  return nullptr;
}

inline int shared_bytes(const Plan& plan) {
  return static_cast<int>(plan.stages_bytes + plan.teams * plan.num_sums * plan.sums_bytes);
}

// What a kernel does before it touches memory that the stream's kernel before it may have written:
// this, where it starts after that one is over.
struct Nothing {
  static constexpr bool kWaits = false;
  __device__ __forceinline__ static void wait() {}
};

// `waits`: the kernel may start while the stream's kernel before it ends, and waits for its end.
template <typename Params, typename Shape>
const char* launch(void (*kernel)(Params, Shape), const Params& p, const Shape& shape, dim3 grid,
                   int threads, int shared_bytes, cudaStream_t stream, bool waits = false) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 40 << 10) {  // with static memory less than the 48 KB all kernels may have
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = waits ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, p, shape);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Params>
const char* launch(void (*kernel)(Params, Plan), const Params& p, const Plan& plan,
                   cudaStream_t stream) {
  return launch(kernel, p, plan, static_cast<unsigned>(plan.ctas * p.entries),
                plan.teams * plan.team_threads, shared_bytes(plan), stream);
}

}  // namespace jax_flash::norm
