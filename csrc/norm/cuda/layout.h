// How the common call is laid over the GPU: a team of warps for each row, or pair of rows that
// share their random draws. A call is common if its rows are aligned, of up to 8192 features, with
// one branch, one norm, no scales, no subsets and no mask that is returned.
#pragma once

#include "norm/cuda/plan.h"

namespace jax_flash::norm {

struct Layout {
  int warps = 0, teams = 0;      // of a team, of a CTA
  int ctas = 0, units = 0;       // of one entry; a unit is a row or a pair
  float per_column = 0.0f;       // 1 / width
  float per_last_column = 0.0f;  // forward: of those that a team's last warp has
  int stages = 0;                // backward: units of a team in shared memory, or on their way
};

inline constexpr int kCommonWidth = 8192, kCommonEntries = 65535;

// Vectors of 8 columns that a thread has in each row.
inline constexpr int kForwardVectors = 2, kBackwardVectors = 2;
inline constexpr int kForwardThreads = kCommonWidth / kCols / kForwardVectors;  // of a CTA at most
inline constexpr int kChunkBytes = 32 * 16;  // of a warp: 16 of each lane

// The backward: threads of a CTA, which fills an SM (128 registers each). A unit is a pair of rows;
// with a float32 stream, of which pairs would take too much shared memory, it is one row.
inline constexpr int kBackwardThreads = 512;
template <int kStreamBytes>
inline constexpr int kBackwardRows = kStreamBytes == 2 ? 2 : 1;

// A warp's shared memory for a unit (elements of the stream, dz and dstream), and for weights.
constexpr int backward_stage_bytes(int64_t x_bytes, int64_t stream_bytes) {
  return static_cast<int>((x_bytes + 2 * stream_bytes) * (stream_bytes == 2 ? 2 : 1)) * kCols *
         kBackwardVectors * 32;
}
inline constexpr int kBackwardWeightBytes = 4 * kCols * kBackwardVectors * 32;

// A CTA is one team, or four where a team is one warp: a CTA with named barriers would count as one
// that has all 16 of them, of 64 that an SM has.
inline Layout forward_layout(const Problem& p) {
  Layout layout;
  constexpr int kWarpColumns = 32 * kCols * kForwardVectors;
  layout.warps = static_cast<int>((p.width + kWarpColumns - 1) / kWarpColumns);
  layout.teams = layout.warps == 1 ? 4 : 1;
  layout.units = static_cast<int>(num_units(p.rows, p.dropout_threshold > 0));
  layout.ctas = (layout.units + layout.teams - 1) / layout.teams;
  layout.per_column = 1.0f / p.width;
  layout.per_last_column = 1.0f / (p.width - kWarpColumns * (layout.warps - 1));
  return layout;
}

// No stages: this GPU's shared memory is too small for the kernel.
inline const char* backward_layout(const BackwardParams& p, Layout& layout) {
  Device device;
  if (const char* error = device.read()) return error;
  const int64_t stream_bytes = item_bytes(p.stream_dtype);
  constexpr int kWarpColumns = 32 * kCols * kBackwardVectors, kStaticBytes = 1024;
  layout.warps = static_cast<int>((p.width + kWarpColumns - 1) / kWarpColumns);
  layout.units = static_cast<int>(num_units(p.rows, stream_bytes == 2));
  layout.per_column = 1.0f / p.width;
  // As many teams as have something to do and fit; there are 15 named barriers
  const int64_t most = std::min(kBackwardThreads / 32 / layout.warps, layout.warps > 1 ? 15 : 16);
  const int64_t busy = layout.units * p.entries / device.sms;
  layout.teams = static_cast<int>(std::clamp<int64_t>(busy, 1, most));
  const int stage_bytes = backward_stage_bytes(item_bytes(p.dtype), stream_bytes);
  for (;; --layout.teams) {
    const int of_warp = (device.shared_bytes - kStaticBytes) / (layout.warps * layout.teams);
    layout.stages = std::clamp((of_warp - kBackwardWeightBytes) / stage_bytes, 0, 4);
    if (layout.stages >= 2 || layout.teams == 1) break;
  }
  const int64_t wanted = (layout.units + layout.teams - 1) / layout.teams;
  const int64_t share = std::max<int64_t>(1, (device.sms + p.entries - 1) / p.entries);
  layout.ctas = static_cast<int>(std::min({wanted, share, p.num_partials}));
  return nullptr;
}

}  // namespace jax_flash::norm
