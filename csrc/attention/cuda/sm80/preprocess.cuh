// Before the backward: for every query row lse * log2(e) and delta = rowsum(dO * O) - dlse, and
// zeros for dQ's sums. One CTA serves one query tile of one head.
#pragma once

#include "attention/cuda/backward_walk.cuh"
#include "attention/cuda/dropout.cuh"
#include "attention/cuda/seqlen.cuh"
#include "device/element.cuh"

namespace jax_flash::attention::sm80 {

inline constexpr int kPreprocessThreads = 256;

// Rows that do not exist or that see no key get lse = +inf, so that their P is 0. delta is divided
// by the dropout scale, which the backward applies to its results instead of to P and dP.
template <typename Element, int kHeadDim, int kBlockM>
__global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_kernel(const __grid_constant__ BackwardArguments a) {
  constexpr int kLanes = kHeadDim / 8;  // threads of a row, 16 bytes each
  constexpr int kRowStep = kPreprocessThreads / kLanes;
  constexpr float kLog2e = 1.4426950408889634f;
  const BackwardParams& p = a.p;
  const BackwardPlan& plan = a.plan;
  const int64_t tile = blockIdx.x;  // [batches, heads, query_slots]
  const int slot = static_cast<int>(tile % plan.query_slots);
  const int head = static_cast<int>(tile / plan.query_slots % p.heads);
  const BatchIndex batch(p, tile / plan.query_slots / p.heads);

  // Zero dQ's sums of this tile.
  constexpr int kVectors = kBlockM * kHeadDim / 4;
  for (int64_t buffer = 0; buffer < plan.dq_buffers; ++buffer) {
    float4* sum =
        reinterpret_cast<float4*>(plan.dq_sum + buffer * plan.dq_elements) + tile * kVectors;
    for (int i = threadIdx.x; i < kVectors; i += kPreprocessThreads) sum[i] = {};
  }

  const Sequence s = find_sequence(p, batch, Axis::kQuery, kBlockM, slot);
  const int lane = threadIdx.x % kLanes, col = 8 * lane;
  const float inverse_dropout_scale = 1.0f / dropout_scale(p.dropout);
#pragma unroll
  for (int first = 0; first < kBlockM; first += kRowStep) {
    const int row_in_tile = first + threadIdx.x / kLanes, row = s.first_row + row_in_tile;
    if (kBlockM < kRowStep && row_in_tile >= kBlockM) break;
    const bool exists = row < s.query_length;
    float delta = 0.0f;
    if (exists && col < p.value_dim) {
      const auto load = [&](const ConstTensor& tensor) {
        return *reinterpret_cast<const uint4*>(
            element_pointer<Element>(tensor, batch, s.query_start + row, head) + col);
      };
      const uint4 o = load(p.o), dout = load(p.dout);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = device::unpack<Element>(reinterpret_cast<const uint32_t*>(&o)[i]);
        const float2 y = device::unpack<Element>(reinterpret_cast<const uint32_t*>(&dout)[i]);
        delta += x.x * y.x + x.y * y.y;
      }
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      delta += __shfl_xor_sync(device::kWarp, delta, step);
    }
    if (lane == 0) {
      float2 stats = {INFINITY, 0.0f};
      if (exists) {
        const float lse = *row_pointer(p.lse, batch, s.query_start + row, head);
        if (p.dlse.data != nullptr) delta -= *row_pointer(p.dlse, batch, s.query_start + row, head);
        if (lse != -INFINITY) stats = {lse * kLog2e, delta * inverse_dropout_scale};
      }
      plan.stats[tile * kBlockM + row_in_tile] = stats;
    }
  }
}

}  // namespace jax_flash::attention::sm80
