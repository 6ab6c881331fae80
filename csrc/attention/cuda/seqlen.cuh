// Which rows a CTA works on: (batch entry, slot) -> the sequence, its rows in the arrays, and the
// band of allowed (i, j). The meaning of every option is in params.h.
//
// A slot is one tile of kBlock rows along the CTA's own axis (queries in the forward kernel). The
// varlen form has more slots than tiles can ever exist, so that the grid needs no knowledge of the
// device's cu_seqlens: sequence p, which starts at row start(p), owns the slots from start(p) /
// kBlock + p on. The rows that no sequence owns form two more pieces, before the first sequence and
// after the last; they have no keys (queries), so that whoever gets them writes empty rows.
#pragma once

#include "attention/params.h"
#include "device/batch.cuh"
#include "device/warp.cuh"

namespace jax_flash::attention {

using device::BatchIndex;

enum class Axis { kQuery, kKey };

// Slots of a batch entry: the grid's extent along an axis of `total` rows.
__host__ __device__ inline int64_t num_slots(const Problem& p, int64_t total, int block) {
  return p.mask.varlen ? total / block + p.num_sequences + 2 : (total + block - 1) / block;
}

__host__ __device__ inline int64_t num_batches(const Problem& p) {
  return p.batch_shape[0] * p.batch_shape[1] * p.batch_shape[2];
}

// Element (row, head, 0) of a tensor.
template <typename Element, typename Void>
__device__ auto element_pointer(const View<Void>& view, const BatchIndex& batch, int64_t row,
                                int64_t head) {
  using Pointer = std::conditional_t<std::is_const_v<Void>, const Element, Element>*;
  return static_cast<Pointer>(view.data) + batch.offset(view.batch) + row * view.row_stride +
         head * view.head_stride;
}

// Element (head, row) of lse, its cotangent or delta.
template <typename Float>
__device__ Float* row_pointer(const RowView<Float>& view, const BatchIndex& batch, int64_t row,
                              int64_t head) {
  return view.data + batch.offset(view.batch) + head * view.head_stride + row;
}

struct Sequence {
  int index = 0;                         // s of the dropout counter
  int query_start = 0, key_start = 0;    // first rows in the arrays
  int query_rows = 0, key_rows = 0;      // rows that belong here and must be written
  int query_length = 0, key_length = 0;  // of them, those that take part
  int first_row = 0;                     // of the slot's tile, from the sequence's start
  int left = 0, right = 0;               // allowed: left <= j - i <= right, beside the lengths

  // The slot has no row at all: return at once.
  __device__ bool slot_is_empty(Axis axis) const {
    return first_row >= (axis == Axis::kQuery ? query_rows : key_rows);
  }
  __device__ bool allows(int i, int j) const {
    return i < query_length && j < key_length && j >= i + left && j <= i + right;
  }
};

__device__ inline int clamp_length(int64_t length, int64_t rows) {
  return static_cast<int>(length < 0 ? 0 : length > rows ? rows : length);
}

// Finds the piece that owns `slot`: lanes look at 32 pieces at a time, with a running maximum over
// the boundaries that makes any garbage monotone. Every warp of the CTA gets the same answer.
__device__ inline void find_piece(const Problem& p, const BatchIndex& batch, Axis axis, int block,
                                  int slot, Sequence& s) {
  const int lane = threadIdx.x % 32;
  const bool own_is_query = axis == Axis::kQuery;
  const int32_t* cu_own = batch.of(own_is_query ? p.mask.query_lengths : p.mask.key_lengths);
  const int32_t* cu_other = batch.of(own_is_query ? p.mask.key_lengths : p.mask.query_lengths);
  const int64_t total_own = own_is_query ? p.seq_q : p.seq_k;
  const int64_t total_other = own_is_query ? p.seq_k : p.seq_q;
  const int sequences = static_cast<int>(p.num_sequences), pieces = sequences + 2;

  int own_carry = 0, other_carry = 0;  // ends of the piece before lane 0's
  for (int base = 0; base < pieces; base += 32) {
    const int piece = base + lane;  // 0: before the first; 1..sequences; sequences + 1: after
    const bool bounded = piece <= sequences;
    int own_end = bounded ? clamp_length(cu_own[piece], total_own) : static_cast<int>(total_own);
    int other_end = bounded ? clamp_length(cu_other[piece], total_other) : 0;
    own_end = max(own_carry, device::inclusive_max(own_end));
    other_end = max(other_carry, device::inclusive_max(other_end));
    const int own_before = __shfl_up_sync(device::kWarp, own_end, 1);
    const int other_before = __shfl_up_sync(device::kWarp, other_end, 1);
    const int own_start = lane == 0 ? own_carry : own_before;
    const int other_start = lane == 0 ? other_carry : other_before;
    const int first_slot = own_start / block + piece, end_slot = own_end / block + piece + 1;
    const uint32_t found =
        __ballot_sync(device::kWarp, piece < pieces && first_slot <= slot && slot < end_slot);
    if (found != 0) {
      const int source = __ffs(found) - 1;
      const int own_first = __shfl_sync(device::kWarp, own_start, source);
      const int own_rows = __shfl_sync(device::kWarp, own_end, source) - own_first;
      const int other_first = __shfl_sync(device::kWarp, other_start, source);
      const int other_rows = __shfl_sync(device::kWarp, other_end, source) - other_first;
      const bool is_sequence = base + source >= 1 && base + source <= sequences;
      s.index = base + source - 1;
      s.first_row = (slot - __shfl_sync(device::kWarp, first_slot, source)) * block;
      s.query_start = own_is_query ? own_first : other_first;
      s.key_start = own_is_query ? other_first : own_first;
      s.query_rows = own_is_query ? own_rows : is_sequence ? other_rows : 0;
      s.key_rows = own_is_query ? (is_sequence ? other_rows : 0) : own_rows;
      s.query_length = is_sequence ? s.query_rows : 0;
      s.key_length = is_sequence ? s.key_rows : 0;
      return;
    }
    own_carry = __shfl_sync(device::kWarp, own_end, 31);
    other_carry = __shfl_sync(device::kWarp, other_end, 31);
  }
}

// The sequence and the tile behind a slot. All 32 lanes of a warp must call it.
__device__ inline Sequence find_sequence(const Problem& p, const BatchIndex& batch, Axis axis,
                                         int block, int slot) {
  Sequence s;
  if (p.mask.varlen) {
    find_piece(p, batch, axis, block, slot, s);
  } else {
    s.query_rows = static_cast<int>(p.seq_q);
    s.key_rows = static_cast<int>(p.seq_k);
    const int32_t* query_length = batch.of(p.mask.query_lengths);
    const int32_t* key_length = batch.of(p.mask.key_lengths);
    s.query_length = query_length ? clamp_length(*query_length, p.seq_q) : s.query_rows;
    s.key_length = key_length ? clamp_length(*key_length, p.seq_k) : s.key_rows;
    s.first_row = slot * block;
  }
  // Sequence axes are below 2^30 (check.h), so a side clamped to 2^30 is no limit, and i + right
  // still fits an int.
  constexpr int64_t kFar = INT64_C(1) << 30;
  const int32_t* causal_offset = batch.of(p.mask.causal_offset);
  const int64_t offset = (causal_offset ? *causal_offset : 0) +
                         (p.mask.bottom_right ? s.key_length - s.query_length : 0);
  s.left = static_cast<int>(max(-kFar, min(kFar, offset - p.mask.window_left)));
  s.right = static_cast<int>(max(-kFar, min(kFar, offset + p.mask.window_right)));
  return s;
}

}  // namespace jax_flash::attention
