// The counters from which persistent CTAs take their next tile, so that whoever is done first goes
// on. A launch needs a counter that is zero when it starts and that no other running launch uses; a
// memset in front of every launch would cost 3 us, several percent of a short call. So counters are
// the module's own memory, zero when it is loaded, and a kernel leaves its counter at zero.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "device/warp.cuh"

namespace jax_flash::attention::sm90 {

inline constexpr int kTileCounters = 1 << 14;  // of each kind: for launches, for captures

// NOTE: one array for each source file that includes this, and so are the host's counts below.
static __device__ uint32_t tile_counters[2 * kTileCounters];

// A counter for one launch on `stream`, or -1. Launches take the counters in turn: the queue of a
// device is far shorter than a turn. A launch that is captured into a graph may run at any later
// time, so that its counter is never given out again; when all have been, -1.
inline int take_tile_counter(cudaStream_t stream) {
  static std::atomic<uint32_t> launches{0};
  static std::atomic<int> captures{0};
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) return -1;
  if (status == cudaStreamCaptureStatusNone) return static_cast<int>(launches++ % kTileCounters);
  const int capture = captures.fetch_add(1);
  if (capture < kTileCounters) return kTileCounters + capture;
  captures = kTileCounters;  // and not beyond the range of int
  return -1;
}

// The next tile for one of `takers` (CTAs, or teams of warps in them) in its `round`-th question;
// tiles from num_tiles on do not exist. One warp. All takers ask until they get one of those.
static __device__ uint32_t next_tile(int counter, uint32_t round, uint32_t num_tiles,
                                     uint32_t taker, uint32_t takers) {
  if (counter < 0 || round == 0) return round * takers + taker;
  uint32_t tile = 0;
  if (threadIdx.x % 32 == 0) {
    const uint32_t taken = atomicAdd(&tile_counters[counter], 1);
    tile = takers + taken;
    // Whoever has had a tile asks once in vain: as many questions as tiles, and none after them.
    if (taken == num_tiles - 1) tile_counters[counter] = 0;
  }
  return device::uniform(tile);
}

}  // namespace jax_flash::attention::sm90
