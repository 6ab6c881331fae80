// How the common call is laid over the GPU: a team of warps for each row, or pair of rows that
// share their random draws. A call is common if its rows are aligned, of up to 8192 features, with
// one branch, one norm, no scales, no subsets and no mask that is returned.
#pragma once

#include <type_traits>

#include "norm/cuda/plan.h"

namespace jax_flash::norm {

struct Layout {
  int warps = 0, teams = 0;        // of a team, of a CTA
  int ctas = 0, units = 0;         // of one entry; a unit is a row or a pair
  int stages = 0;                  // backward: units of a team in shared memory, or on their way
  int shared_bytes = 0;            // of a CTA
  bool fits = true;                // into this GPU's shared memory
  float per_column = 0.0f;         // 1 / width
  float per_last_column = 0.0f;    // forward: of those that a team's last warp has
  uint32_t* units_done = nullptr;  // backward: by all teams (pace.cuh); nullptr: nobody waits
  bool may_pace = false;           // backward: may count units (pace.cuh)
  int rows_ahead = 0;              // forward: how far ahead rows are brought into L2; 0: none are
};

inline constexpr int kCommonWidth = 8192, kCommonEntries = 65535;

// Vectors of 8 columns that a thread has in each row.
inline constexpr int kForwardVectors = 2, kBackwardVectors = 2;
inline constexpr int kForwardThreads = kCommonWidth / kCols / kForwardVectors;  // of a CTA at most
inline constexpr int kStaticBytes = 1024;  // of shared memory, at most

// The backward: threads of a CTA, which fills an SM (128 registers each). A unit is a row, of which
// two are enough on the way: with four some SMs ran further ahead of others (4096 features: 134.6
// us for 133.0, H200, 2026-11-28). With dropout it is a pair of rows; with a float32 stream, of
// which pairs would take too much shared memory, a row.
inline constexpr int kBackwardThreads = 512, kBackwardStages = 2;
constexpr int backward_rows(int64_t stream_bytes, bool has_dropout) {
  return has_dropout && stream_bytes == 2 ? 2 : 1;
}

// A warp's shared memory for a unit (elements of the stream, dz and dstream), and for weights.
constexpr int backward_stage_bytes(int64_t x_bytes, int64_t stream_bytes, bool has_dropout) {
  return static_cast<int>(x_bytes + 2 * stream_bytes) * backward_rows(stream_bytes, has_dropout) *
         kCols * kBackwardVectors * 32;
}
inline constexpr int kBackwardWeightBytes = 4 * kCols * kBackwardVectors * 32;

// A CTA is one team, or four where a team is one warp: a CTA with named barriers would count as one
// that has all 16 of them, of 64 that an SM has.
inline const char* forward_layout(const ForwardParams& p, Layout& layout) {
  Device device;
  if (const char* error = device.read()) return error;
  constexpr int kWarpColumns = 32 * kCols * kForwardVectors;
  const bool has_dropout = p.dropout_threshold > 0;
  layout.warps = static_cast<int>((p.width + kWarpColumns - 1) / kWarpColumns);
  layout.teams = layout.warps == 1 ? 4 : 1;
  layout.units = static_cast<int>(num_units(p.rows, has_dropout));
  layout.ctas = (layout.units + layout.teams - 1) / layout.teams;
  if (has_dropout) {  // both rows of x and the residual
    const int64_t column_bytes = 2 * (item_bytes(p.dtype) + item_bytes(p.stream_dtype));
    layout.shared_bytes =
        static_cast<int>(layout.warps * layout.teams * kWarpColumns * column_bytes);
  }
  layout.fits = layout.shared_bytes <= device.shared_bytes - kStaticBytes;
  // A quarter of the CTAs that run at a time, 32 warps an SM. At 4096 features 130.3 us for 133.2
  // (half of them 130.6, all of them 141.1), at 8192 254.9 for 260.9, at 2048 67.7 for 68.0, at
  // 1024 36.2 for 36.4 (H200, 2026-11-28).
  if (layout.warps > 1) layout.rows_ahead = device.sms * 8 / layout.warps;
  layout.per_column = 1.0f / p.width;
  layout.per_last_column = 1.0f / (p.width - kWarpColumns * (layout.warps - 1));
  return nullptr;
}

inline const char* backward_layout(const BackwardParams& p, Layout& layout) {
  Device device;
  if (const char* error = device.read()) return error;
  const int64_t stream_bytes = item_bytes(p.stream_dtype);
  const bool has_dropout = p.dropout_threshold > 0;
  constexpr int kWarpColumns = 32 * kCols * kBackwardVectors;
  layout.warps = static_cast<int>((p.width + kWarpColumns - 1) / kWarpColumns);
  layout.units = static_cast<int>(num_units(p.rows, backward_rows(stream_bytes, has_dropout) == 2));
  layout.per_column = 1.0f / p.width;
  // As many teams as have something to do and fit; there are 15 named barriers
  const int64_t most = std::min(kBackwardThreads / 32 / layout.warps, layout.warps > 1 ? 15 : 16);
  const int64_t busy = layout.units * p.entries / device.sms;
  layout.teams = static_cast<int>(std::clamp<int64_t>(busy, 1, most));
  const int stage_bytes = backward_stage_bytes(item_bytes(p.dtype), stream_bytes, has_dropout);
  for (;; --layout.teams) {
    const int of_warp = (device.shared_bytes - kStaticBytes) / (layout.warps * layout.teams);
    layout.stages = std::clamp((of_warp - kBackwardWeightBytes) / stage_bytes, 0, kBackwardStages);
    if (layout.stages >= 2 || layout.teams == 1) break;
  }
  layout.fits = layout.stages > 0;
  layout.shared_bytes =
      layout.warps * layout.teams * (layout.stages * stage_bytes + kBackwardWeightBytes);
  const int64_t wanted = (layout.units + layout.teams - 1) / layout.teams;
  const int64_t share = std::max<int64_t>(1, (device.sms + p.entries - 1) / p.entries);
  layout.ctas = static_cast<int>(std::min({wanted, share, p.num_partials}));
  // All CTAs run at once, and a unit takes longer than it takes to count it
  layout.may_pace = backward_rows(stream_bytes, has_dropout) == 2 && layout.warps >= 4 &&
                    layout.ctas * p.entries <= device.sms;
  return nullptr;
}

// kernel_of(S{}, std::bool_constant<kHasDropout>{}): the kernel of the stream's type S.
template <typename X, typename Before, typename Params, typename KernelOf>
const char* launch_common(const Params& p, const Layout& layout, cudaStream_t stream,
                          KernelOf kernel_of) {
  const dim3 grid(layout.ctas, static_cast<unsigned>(p.entries));
  auto run = [&](auto s) {
    auto* kernel =
        p.dropout_threshold ? kernel_of(s, std::true_type{}) : kernel_of(s, std::false_type{});
    return launch(kernel, p, layout, grid, 32 * layout.warps * layout.teams, layout.shared_bytes,
                  stream, Before::kWaits);
  };
  return p.stream_dtype == p.dtype ? run(X{}) : run(float{});
}

}  // namespace jax_flash::norm
