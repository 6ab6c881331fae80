// The two small kernels around the Hopper backward.
//   prepare  lse * log2(e) and delta = rowsum(dO * O) - dlse of every query row, zeros for dQ's
//            sums, and what every key tile has to do
//   finish   dQ's f32 sums -> 16 bits
#pragma once

#include "attention/cuda/dropout.cuh"
#include "attention/cuda/sm90/backward_common.cuh"
#include "attention/cuda/sm90/backward_terms.cuh"
#include "device/element.cuh"
#include "ptx/sm90.cuh"

namespace jax_flash::attention::sm90 {

inline constexpr int kPassThreads = 256;
inline constexpr int kPlacesPerCta = kPassThreads / 32;

__device__ __forceinline__ DropoutWords find_dropout(const BackwardParams& p,
                                                     const BatchIndex& batch, const Sequence& s) {
  if (p.dropout.threshold == 0) return {};  // the state may be absent
  const uint32_t* state = batch.of(p.dropout.state);
  return {state[0], state[1], state[2] * static_cast<uint32_t>(p.num_sequences) + s.index};
}

// All lanes of a warp must call it together.
template <class Traits>
__device__ __forceinline__ KeyTilePlace find_place(const BackwardArguments& a, int index) {
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  const uint32_t splits = a.plan.key_splits, split = index % splits, tile = index / splits;
  const uint32_t section = a.section, slots = a.plan.key_slots;
  const uint32_t in_section = tile % (section * slots);
  const uint32_t column = tile / (section * slots) * section + in_section % section;
  const uint32_t slot = in_section / section;
  const uint32_t kv_heads = a.p.kv_heads, heads = a.p.heads, batch_index = column / kv_heads;
  const BatchIndex batch(a.p, batch_index);
  const Sequence s = find_sequence(a.p, batch, Axis::kKey, kBlockN, static_cast<int>(slot));
  const TileRange range = query_tiles<kBlockM, kBlockN>(s, s.first_row);
  const int group = static_cast<int>(heads / kv_heads), kv_head = column % kv_heads;
  const int count = max(range.end - range.begin, 0);
  const int next = static_cast<int>(int64_t{count} * group * split / splits);
  const int last = static_cast<int>(int64_t{count} * group * (split + 1) / splits);
  int query_tile = static_cast<int>(batch_index * heads * a.plan.query_slots);
  if (a.p.mask.varlen) query_tile += s.query_start / kBlockM + s.index + 1;
  float* dkv_sum = nullptr;
  if (splits > 1) {
    dkv_sum = a.plan.dkv_sum + split * 2 * a.plan.dkv_elements +
              (int64_t{column} * slots + slot) * a.plan.key_tile_elements;
  }
  KeyTilePlace place = {.sequence = s,
                        .batch = batch,
                        .range = range,
                        .dkv_sum = dkv_sum,
                        .query_tile = query_tile,
                        .kv_head = kv_head,
                        .first_head = kv_head * group + (count > 0 ? next / count : 0),
                        .first_tile = range.begin + (count > 0 ? next % count : 0),
                        .num_steps = last - next,
                        .dropout = find_dropout(a.p, batch, s),
                        .exists = true};
  if constexpr (kTakesColumns<Traits>) {
    const auto neighbour = [&](int tiles) {
      return query_tiles<kBlockM, kBlockN>(s, s.first_row + tiles * kBlockN);
    };
    const bool is_last = slot + 1 == slots;
    place.first_unseen = slot > 0 ? neighbour(-1).end : range.begin;
    place.end_of_complete = is_last ? range.end : neighbour(1).begin;
    place.next = index + 1 + (is_last ? (a.workers - 1) * static_cast<int>(slots) : 0);
  }
  return place;
}

// CTAs [0, query tiles) serve a query tile each, the rest kPlacesPerCta places each. Rows that do
// not exist or that see no key get lse = +inf, so that their P is 0 (as a term: the largest there
// is). delta is divided by the dropout scale, which the main kernel applies to its results instead
// of to P and dP.
template <class Traits>
__global__ void __launch_bounds__(kPassThreads)
    prepare_kernel(const __grid_constant__ BackwardArguments a) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;
  constexpr int kLanes = kHeadDim / 8;  // threads of a row, 16 bytes each
  constexpr int kRowStep = kPassThreads / kLanes;
  constexpr float kLog2e = 1.4426950408889634f;
  static_assert(kBlockM % kRowStep == 0);
  const BackwardParams& p = a.p;
  const BackwardPlan& plan = a.plan;
  const uint32_t slots = plan.query_slots, heads = p.heads;
  const uint32_t query_tiles = static_cast<uint32_t>(plan.batches) * heads * slots;
  const uint32_t tile = blockIdx.x;  // [batches, heads, query_slots]
  if (tile >= query_tiles) {
    const int index = static_cast<int>((tile - query_tiles) * kPlacesPerCta + threadIdx.x / 32);
    if (index == 0 && threadIdx.x == 0) *a.next_tile = 0;
    if (index == a.num_places && threadIdx.x % 32 == 0) a.places[index].exists = false;
    if (index >= a.num_places) return;
    const KeyTilePlace place = find_place<Traits>(a, index);
    if (threadIdx.x % 32 == 0) a.places[index] = place;
    return;
  }
  const uint32_t column = tile / slots;  // of heads
  const int slot = static_cast<int>(tile % slots), head = static_cast<int>(column % heads);
  const BatchIndex batch(p, column / heads);
  const Sequence s = find_sequence(p, batch, Axis::kQuery, kBlockM, slot);

  const int lane = threadIdx.x % kLanes, col = 8 * lane;
  const float inverse_dropout_scale = 1.0f / dropout_scale(p.dropout);
  constexpr int kTermRows = Traits::kTermRows;
  char* const stats =
      reinterpret_cast<char*>(plan.stats) + int64_t{tile} * (kPlanStatBytes * kBlockM);
  // What is no term, in the order of stats_index.
  float* const other_stats = reinterpret_cast<float*>(stats + 2 * kTermRows * kBlockM);
  __shared__ float terms[2][kBlockM];
  const auto first_row = [&](const ConstTensor& tensor) {
    const int row = s.query_start + s.first_row + threadIdx.x / kLanes;
    return element_pointer<Element>(tensor, batch, row, head) + col;
  };
  const Element *const o_rows = first_row(p.o), *const dout_rows = first_row(p.dout);
  // All loads first: a CTA lives for little more than one latency.
  constexpr int kSteps = kBlockM / kRowStep;
  uint4 o[kSteps], dout[kSteps];
  float lse[kSteps], dlse[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = s.first_row + i * kRowStep + threadIdx.x / kLanes;
    const bool exists = row < s.query_length;
    const auto load = [&](const Element* rows, int64_t row_stride) -> uint4 {
      if (!exists || col >= p.value_dim) return {};
      return *reinterpret_cast<const uint4*>(rows + i * kRowStep * row_stride);
    };
    o[i] = load(o_rows, p.o.row_stride);
    dout[i] = load(dout_rows, p.dout.row_stride);
    lse[i] = -INFINITY;
    dlse[i] = 0.0f;
    if (lane == 0 && exists) {
      lse[i] = *row_pointer(p.lse, batch, s.query_start + row, head);
      if (p.dlse.data != nullptr) dlse[i] = *row_pointer(p.dlse, batch, s.query_start + row, head);
    }
  }

  // Under their latency.
  if constexpr (!kTakesColumns<Traits>) {
    bool has_adders = false;
    if (Traits::kStoresFirst && a.dq_order != DqOrder::kAny) {
      if (threadIdx.x < 2) a.dq_states[2 * tile + threadIdx.x] = 0;
      has_adders = sees_key_tile<Traits>(s, s.first_row);
    }
    if (!has_adders) {
      constexpr int kVectors = kBlockM * kHeadDim / 4;
      float4* sum = reinterpret_cast<float4*>(plan.dq_sum) + int64_t{tile} * kVectors;
#pragma unroll
      for (int i = 0; i < kVectors; i += kPassThreads) sum[i + threadIdx.x] = {};
    }
  }

#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    float delta = 0.0f;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float2 x = device::unpack<Element>(reinterpret_cast<const uint32_t*>(&o[i])[word]);
      const float2 y = device::unpack<Element>(reinterpret_cast<const uint32_t*>(&dout[i])[word]);
      delta += x.x * y.x + x.y * y.y;
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      delta += __shfl_xor_sync(device::kWarp, delta, step);
    }
    if (lane == 0) {
      const int row = i * kRowStep + threadIdx.x / kLanes;
      const bool sees_keys = lse[i] != -INFINITY;
      delta = sees_keys ? (delta - dlse[i]) * inverse_dropout_scale : 0.0f;
      if constexpr (kTermRows > 0) {
        terms[0][row] = sees_keys ? -lse[i] / p.scale : -kMaxTerm<Element>;
      } else {
        other_stats[stats_index(row)] = sees_keys ? lse[i] * kLog2e : INFINITY;
      }
      if constexpr (kTermRows > kTermParts) {
        terms[1][row] = -delta;
      } else {
        other_stats[(kTermRows > 0 ? 0 : kBlockM) + stats_index(row)] = delta;
      }
      if constexpr (Traits::kHasDropout) {
        reinterpret_cast<Element*>(stats + kMinusDelta<kBlockM>)[stats_index(row)] =
            static_cast<Element>(fminf(fmaxf(-delta, -kLargest<Element>), kLargest<Element>));
      }
    }
  }
  if constexpr (kTermRows > 0) {
    __syncthreads();  // All terms are there.
    write_terms<Element, kTermRows>(stats, terms);
  }
}

// Adds up the f32 sums of a tile, scales them and writes them as rows [first_row, rows) of a
// tensor. A sum lies in blocks of 64 rows x 64 dims, rows first, a block as the accumulators of the
// warpgroup that made it: [n][thread][4].
template <typename Element, int kBlockRows, int kHeadDim>
__device__ __forceinline__ void finish_tile(const float* sums, int64_t buffers,
                                            int64_t buffer_stride, float scale,
                                            Element* destination, int64_t row_stride, int rows,
                                            int cols) {
  constexpr int kDimBlocks = kHeadDim / 64, kBlocks = kBlockRows / 64 * kDimBlocks;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, quad_lane = lane % 4;
#pragma unroll
  for (int first = 0; first < kBlocks; first += kPassThreads / 128) {
    const int block = first + threadIdx.x / 128;
    if (kBlocks % (kPassThreads / 128) != 0 && block >= kBlocks) break;
    float4 sum[8] = {};
    for (int64_t buffer = 0; buffer < buffers; ++buffer) {
      const float4* source =
          reinterpret_cast<const float4*>(sums + buffer * buffer_stride + block * 4096);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float4 x = source[n * 128 + thread];
        sum[n] = {sum[n].x + x.x, sum[n].y + x.y, sum[n].z + x.z, sum[n].w + x.w};
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block / kDimBlocks * 64 + thread / 32 * 16 + lane / 4 + 8 * half;
      uint32_t pairs[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        pairs[n] = half == 0 ? device::pack<Element>(sum[n].x * scale, sum[n].y * scale)
                             : device::pack<Element>(sum[n].z * scale, sum[n].w * scale);
      }
      // Lane q of a quad holds columns 8 n + 2 q and + 1 of each n; it leaves with columns 8 q to
      // 8 q + 7, and 32 more. In turn t it hands lane q ^ t the pair of that lane's columns.
#pragma unroll
      for (int group = 0; group < 8; group += 4) {
        uint32_t words[4];
#pragma unroll
        for (int turn = 0; turn < 4; ++turn) {
          const int chunk = quad_lane ^ turn;
          const uint32_t out = chunk == 0   ? pairs[group]
                               : chunk == 1 ? pairs[group + 1]
                               : chunk == 2 ? pairs[group + 2]
                                            : pairs[group + 3];
          const uint32_t in = __shfl_xor_sync(device::kWarp, out, turn);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if (q == chunk) words[q] = in;
          }
        }
        const int col = block % kDimBlocks * 64 + 8 * (group + quad_lane);
        if (row < rows && col < cols) {
          *reinterpret_cast<uint4*>(destination + row * row_stride + col) = {words[0], words[1],
                                                                             words[2], words[3]};
        }
      }
    }
  }
}

// CTAs [0, query tiles) serve a query tile each; with several key splits, CTAs from there on serve
// dK, then dV, of a key tile each.
template <class Traits>
__global__ void __launch_bounds__(kPassThreads)
    finish_kernel(const __grid_constant__ BackwardArguments a) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kHeadDim = Traits::kHeadDim;
  const BackwardParams& p = a.p;
  const BackwardPlan& plan = a.plan;
  const float dropout = dropout_scale(p.dropout);
  const uint32_t slots = plan.query_slots, heads = p.heads;
  const uint32_t query_tiles = static_cast<uint32_t>(plan.batches) * heads * slots;
  if (blockIdx.x < query_tiles) {
    const uint32_t tile = blockIdx.x;  // [batches, heads, query_slots]
    const int slot = static_cast<int>(tile % slots);
    const int head = static_cast<int>(tile / slots % heads);
    const BatchIndex batch(p, tile / slots / heads);
    const Sequence s = find_sequence(p, batch, Axis::kQuery, kBlockM, slot);
    if (s.slot_is_empty(Axis::kQuery)) return;
    finish_tile<Element, kBlockM, kHeadDim>(
        plan.dq_sum + int64_t{tile} * (kBlockM * kHeadDim), 1, 0, p.scale * dropout,
        element_pointer<Element>(p.dq, batch, s.query_start + s.first_row, head), p.dq.row_stride,
        s.query_rows - s.first_row, static_cast<int>(p.head_dim));
  } else {
    const int64_t index = blockIdx.x - query_tiles,
                  tiles = plan.batches * p.kv_heads * plan.key_slots;
    const bool is_value = index >= tiles;
    const int64_t tile = index % tiles;  // [batches, kv_heads, key_slots]
    const int slot = static_cast<int>(tile % plan.key_slots);
    const int head = static_cast<int>(tile / plan.key_slots % p.kv_heads);
    const BatchIndex batch(p, tile / plan.key_slots / p.kv_heads);
    const Sequence s = find_sequence(p, batch, Axis::kKey, kBlockN, slot);
    if (s.slot_is_empty(Axis::kKey)) return;
    const Tensor& out = is_value ? p.dv : p.dk;
    finish_tile<Element, kBlockN, kHeadDim>(
        plan.dkv_sum + (is_value ? plan.dkv_elements : 0) + tile * plan.key_tile_elements,
        plan.key_splits, 2 * plan.dkv_elements, is_value ? dropout : p.scale * dropout,
        element_pointer<Element>(out, batch, s.key_start + s.first_row, head), out.row_stride,
        s.key_rows - s.first_row, static_cast<int>(is_value ? p.value_dim : p.head_dim));
  }
}

}  // namespace jax_flash::attention::sm90
