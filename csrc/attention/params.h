// What one attention call is, independent of XLA and of the device that runs it.
//
//   P = softmax(scale * Q K^T  restricted to the allowed (i, j)),   O = dropout(P) V,   lse = log
//   sum exp
//
// ffi_{cpu,cuda}.cc fill these structs from XLA's buffers (through check.h); the kernels read
// nothing else. A call has up to three leading batch axes; an operand that is shared along one of
// them (vmap with in_axes=None) has stride 0 there, so nothing is ever repeated in memory.
#pragma once

#include <cstdint>

#include "common/batch.h"
#include "common/dtype.h"

namespace jax_flash::attention {

inline constexpr int64_t kUnbounded = INT64_C(1) << 40;  // a window side without a limit

// A view of [b0, b1, b2, rows, heads, head_dim], last axis contiguous, strides in elements. Packed
// operands are three (or two) such views into one buffer.
template <typename Void>
struct View {
  Void* data = nullptr;
  BatchStrides batch;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};
using ConstTensor = View<const void>;
using Tensor = View<void>;

// A view of float32 [b0, b1, b2, heads, rows], last axis contiguous (lse, its cotangent, delta).
template <typename Float>
struct RowView {
  Float* data = nullptr;
  BatchStrides batch;
  int64_t head_stride = 0;
};
using ConstRows = RowView<const float>;
using Rows = RowView<float>;

// Which (query i, key j) pairs exist. All of it is one question that a tile asks: skip, full,
// partial.
//   dense : i < query_lengths[b] (or seq_q), j < key_lengths[b] (or seq_k); lengths are clamped to
//   the axes varlen: sequence s owns rows [cu[s], cu[s+1]) after clamping to [0, total] and a
//   running maximum;
//           i and j count from the start of the sequence
//   diagonal: -window_left <= j - i - offset <= window_right,
//           offset = causal_offset[b] + (bottom_right ? len_k - len_q : 0)
//   blocks: block_mask[b, head, i / block_rows, j / block_cols] != 0
struct MaskParams {
  int64_t window_left = kUnbounded;
  int64_t window_right = kUnbounded;  // causal: 0
  bool bottom_right = false;
  bool varlen = false;
  PerBatch<int32_t>
      query_lengths;  // dense: [b0, b1, b2, 1]; varlen: cu_seqlens [b0, b1, b2, num_sequences + 1]
  PerBatch<int32_t> key_lengths;    // likewise
  PerBatch<int32_t> causal_offset;  // [b0, b1, b2, 1]

  PerBatch<uint8_t> block_mask;  // [b0, b1, b2, 1 or heads, num_block_rows, num_block_cols]
  int64_t block_head_stride = 0;
  int32_t block_rows = 0, block_cols = 0;  // granularity of a block, in queries and keys
  int32_t num_block_rows = 0, num_block_cols = 0;
};

// Counter-based dropout (common/philox.h): element (i, j) of sequence s, batch entry b, head h is
// dropped where its 16-bit draw is below `threshold`; the kept ones are scaled by 65536 / (65536 -
// threshold).
struct DropoutParams {
  uint32_t threshold = 0;    // 0: no dropout
  PerBatch<uint32_t> state;  // [b0, b1, b2, 4]: key word 0, key word 1, global batch index, 0
  const uint32_t* head_ids = nullptr;  // [heads]: global head indices (a shard sees its own slice)
};
// The counter's batch word is state[2] * num_sequences + s (s = 0 in the dense form).

struct Problem {
  DType dtype = DType::kF32;
  int64_t batch_shape[kBatchDims] = {1, 1, 1};
  int64_t num_sequences = 1;  // varlen: sequences per batch entry; dense: 1
  int64_t seq_q = 0;          // dense: T; varlen: total_q (rows of the query array)
  int64_t seq_k = 0;          // dense: S; varlen: total_k
  int64_t heads = 0;
  int64_t kv_heads = 0;  // heads % kv_heads == 0; query head h reads kv head h / (heads / kv_heads)
  int64_t head_dim = 0;  // of query and key; a multiple of 8
  int64_t value_dim = 0;  // of value and out; a multiple of 8
  float scale = 1.0f;
  MaskParams mask;
  DropoutParams dropout;
};

struct ForwardParams : Problem {
  ConstTensor q, k, v;
  Tensor o;  // [batch, seq_q, heads, value_dim]
  Rows lse;  // [batch, heads, seq_q]; natural log; -inf for rows that see no key
};

struct BackwardParams : Problem {
  ConstTensor q, k, v, o, dout;
  ConstRows lse;
  ConstRows
      dlse;  // data == nullptr: no cotangent for lse; else folded: delta = rowsum(dO*O) - dlse
  Tensor dq, dk, dv;          // same layouts as q, k, v; packed gradients are views into one buffer
  void* workspace = nullptr;  // scratch that XLA owns; its size is _ops/attention.py's affair
  int64_t workspace_bytes = 0;
  bool deterministic = false;
};

}  // namespace jax_flash::attention
