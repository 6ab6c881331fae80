// XLA buffers -> ForwardParams / BackwardParams, with every shape and type checked on the way.
// Python checks first and with better words; these checks are what stands between a wrong caller
// and somebody else's memory.
//
// Every operand has exactly kBatchDims leading batch axes (1 or the full size); an option that is
// off is an empty buffer of shape (0,). Packed operands come in `query` (qkv: [..., rows, 3, heads,
// dim]) or in `key` (kv: [..., rows, 2, heads, dim]); the places they leave free are empty. The
// attribute list is the one of _ops/attention.py.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "attention/params.h"
#include "common/layout.h"

namespace jax_flash::attention {

enum class Packing : int32_t { kSeparate = 0, kKeyValue = 1, kQueryKeyValue = 2 };

struct Operands {  // shared by forward and backward
  ffi::AnyBuffer query, key, value;
  ffi::AnyBuffer query_lengths, key_lengths, causal_offset;
  ffi::AnyBuffer dropout_state, head_ids, block_mask;
};

template <typename Void>
View<Void> tensor_view(const Layout& layout, Void* data, int64_t part = -1,
                       int64_t item_bytes = 0) {
  View<Void> view;
  view.batch = layout.batch();
  view.row_stride = layout.stride(0);
  const bool packed = part >= 0;
  view.head_stride = layout.stride(packed ? 2 : 1);
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  view.data = packed ? static_cast<Byte*>(data) + part * layout.stride(1) * item_bytes : data;
  return view;
}

template <typename Float>
RowView<Float> row_view(const Layout& layout, Float* data) {
  return {data, layout.batch(), layout.stride(0)};
}

// Fills Problem and the q, k, v views; `batch_shape` is the full one, taken from an output of the
// call.
template <typename Params>
ffi::Error decode(const Operands& in, const ffi::Dictionary& attributes,
                  ffi::Span<const int64_t> full_shape, Params& p, Packing& packing) {
  float scale;
  int64_t window_left, window_right, threshold, block_rows, block_cols, packing_code;
  bool bottom_right, varlen;
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "scale", scale));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "window_left", window_left));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "window_right", window_right));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "bottom_right", bottom_right));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "varlen", varlen));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "dropout_threshold", threshold));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "block_rows", block_rows));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "block_cols", block_cols));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "packing", packing_code));
  packing = static_cast<Packing>(packing_code);

  const auto dtype = to_dtype(in.query.element_type());
  if (!dtype) return bad_argument("query", "float32, float16 or bfloat16", in.query.element_type());
  p.dtype = *dtype;
  const int64_t bytes = item_bytes(p.dtype);
  if (full_shape.size() < kBatchDims)
    return bad_argument("out", "leading batch axes", to_string(full_shape));
  std::copy_n(full_shape.begin(), kBatchDims, p.batch_shape);

  // Q, K, V: separate, K and V packed, or all three packed.
  const Layout q("query", in.query);
  const auto q_dims = in.query.dimensions();
  if (packing == Packing::kQueryKeyValue) {
    if (q_dims.size() != kBatchDims + 4) return bad_argument("qkv", "7 axes", to_string(q_dims));
    p.seq_q = p.seq_k = q_dims[kBatchDims];
    p.heads = p.kv_heads = q_dims[kBatchDims + 2];
    p.head_dim = p.value_dim = q_dims[kBatchDims + 3];
    JAX_FLASH_RETURN_IF_ERROR(q.expect(p.batch_shape, {p.seq_q, 3, p.heads, p.head_dim}));
    p.q = tensor_view<const void>(q, in.query.untyped_data(), 0, bytes);
    p.k = tensor_view<const void>(q, in.query.untyped_data(), 1, bytes);
    p.v = tensor_view<const void>(q, in.query.untyped_data(), 2, bytes);
  } else {
    if (q_dims.size() != kBatchDims + 3) return bad_argument("query", "6 axes", to_string(q_dims));
    p.seq_q = q_dims[kBatchDims];
    p.heads = q_dims[kBatchDims + 1];
    p.head_dim = q_dims[kBatchDims + 2];
    JAX_FLASH_RETURN_IF_ERROR(q.expect(p.batch_shape, {p.seq_q, p.heads, p.head_dim}));
    p.q = tensor_view<const void>(q, in.query.untyped_data());
    const Layout k("key", in.key);
    const auto k_dims = in.key.dimensions();
    if (in.key.element_type() != in.query.element_type()) {
      return bad_argument("key", in.query.element_type(), in.key.element_type());
    }
    if (packing == Packing::kKeyValue) {
      if (k_dims.size() != kBatchDims + 4)
        return bad_argument("key_value", "7 axes", to_string(k_dims));
      p.seq_k = k_dims[kBatchDims];
      p.kv_heads = k_dims[kBatchDims + 2];
      p.value_dim = p.head_dim;
      JAX_FLASH_RETURN_IF_ERROR(k.expect(p.batch_shape, {p.seq_k, 2, p.kv_heads, p.head_dim}));
      p.k = tensor_view<const void>(k, in.key.untyped_data(), 0, bytes);
      p.v = tensor_view<const void>(k, in.key.untyped_data(), 1, bytes);
    } else {
      const Layout v("value", in.value);
      const auto v_dims = in.value.dimensions();
      if (k_dims.size() != kBatchDims + 3) return bad_argument("key", "6 axes", to_string(k_dims));
      if (v_dims.size() != kBatchDims + 3)
        return bad_argument("value", "6 axes", to_string(v_dims));
      if (in.value.element_type() != in.query.element_type()) {
        return bad_argument("value", in.query.element_type(), in.value.element_type());
      }
      p.seq_k = k_dims[kBatchDims];
      p.kv_heads = k_dims[kBatchDims + 1];
      p.value_dim = v_dims[kBatchDims + 2];
      JAX_FLASH_RETURN_IF_ERROR(k.expect(p.batch_shape, {p.seq_k, p.kv_heads, p.head_dim}));
      JAX_FLASH_RETURN_IF_ERROR(v.expect(p.batch_shape, {p.seq_k, p.kv_heads, p.value_dim}));
      p.k = tensor_view<const void>(k, in.key.untyped_data());
      p.v = tensor_view<const void>(v, in.value.untyped_data());
    }
  }
  if (p.kv_heads <= 0 || p.heads % p.kv_heads != 0) {
    return bad_argument("key", "a number of heads that divides query's", p.kv_heads);
  }
  if (p.head_dim % 8 != 0 || p.head_dim < 8 || p.head_dim > 256) {
    return bad_argument("query", "a head dim that is a multiple of 8, 8..256", p.head_dim);
  }
  if (p.value_dim % 8 != 0 || p.value_dim < 8 || p.value_dim > 256) {
    return bad_argument("value", "a head dim that is a multiple of 8, 8..256", p.value_dim);
  }
  if (p.seq_q > INT32_MAX / 2 || p.seq_k > INT32_MAX / 2) {
    return bad_argument("query, key", "sequence axes below 2^30", std::max(p.seq_q, p.seq_k));
  }
  p.scale = scale;

  // Masks.
  MaskParams& mask = p.mask;
  mask.varlen = varlen;
  mask.bottom_right = bottom_right;
  mask.window_left = window_left < 0 ? kUnbounded : std::min(window_left, kUnbounded);
  mask.window_right = window_right < 0 ? kUnbounded : std::min(window_right, kUnbounded);
  int64_t lengths = 1;
  if (varlen) {
    const auto cu_dims = in.query_lengths.dimensions();
    if (cu_dims.size() != kBatchDims + 1 || cu_dims[kBatchDims] < 1) {
      return bad_argument("cu_seqlens_q", "[batch axes, sequences + 1]", to_string(cu_dims));
    }
    lengths = cu_dims[kBatchDims];
    p.num_sequences = lengths - 1;
    if (is_empty(in.key_lengths)) return bad_argument("cu_seqlens_k", "an array", "nothing");
  }
  JAX_FLASH_RETURN_IF_ERROR(per_batch(varlen ? "cu_seqlens_q" : "query_seq_lengths",
                                      in.query_lengths, ffi::S32, p.batch_shape, {lengths},
                                      mask.query_lengths));
  JAX_FLASH_RETURN_IF_ERROR(per_batch(varlen ? "cu_seqlens_k" : "key_value_seq_lengths",
                                      in.key_lengths, ffi::S32, p.batch_shape, {lengths},
                                      mask.key_lengths));
  JAX_FLASH_RETURN_IF_ERROR(per_batch("causal_offset", in.causal_offset, ffi::S32, p.batch_shape,
                                      {1}, mask.causal_offset));
  if (!is_empty(in.block_mask)) {
    const auto dims = in.block_mask.dimensions();
    if (dims.size() != kBatchDims + 3 || block_rows <= 0 || block_cols <= 0 ||
        (dims[kBatchDims] != 1 && dims[kBatchDims] != p.heads)) {
      return bad_argument("block_mask", "[batch axes, 1 or heads, block rows, block columns]",
                          to_string(dims));
    }
    const int64_t rows = (p.seq_q + block_rows - 1) / block_rows,
                  cols = (p.seq_k + block_cols - 1) / block_cols;
    JAX_FLASH_RETURN_IF_ERROR(per_batch("block_mask", in.block_mask, ffi::U8, p.batch_shape,
                                        {dims[kBatchDims], rows, cols}, mask.block_mask));
    mask.block_rows = static_cast<int32_t>(block_rows);
    mask.block_cols = static_cast<int32_t>(block_cols);
    mask.num_block_rows = static_cast<int32_t>(rows);
    mask.num_block_cols = static_cast<int32_t>(cols);
    mask.block_head_stride = dims[kBatchDims] == 1 ? 0 : rows * cols;
  }

  // Dropout.
  if (threshold < 0 || threshold > 65535)
    return bad_argument("dropout_threshold", "0..65535", threshold);
  p.dropout.threshold = static_cast<uint32_t>(threshold);
  if (threshold > 0) {
    if (is_empty(in.dropout_state)) return bad_argument("dropout_state", "an array", "nothing");
    JAX_FLASH_RETURN_IF_ERROR(per_batch("dropout_state", in.dropout_state, ffi::U32, p.batch_shape,
                                        {4}, p.dropout.state));
    const auto ids = in.head_ids.dimensions();
    if (ids.size() != 1 || ids[0] != p.heads || in.head_ids.element_type() != ffi::U32) {
      return bad_argument("head_ids", "uint32 [heads]", to_string(ids));
    }
    p.dropout.head_ids = static_cast<const uint32_t*>(in.head_ids.untyped_data());
  }
  return ffi::Error::Success();
}

inline ffi::Error rows_of(const char* name, const ffi::AnyBuffer& buffer, const Problem& p,
                          bool full_batch, Layout& layout) {
  if (buffer.element_type() != ffi::F32) return bad_argument(name, ffi::F32, buffer.element_type());
  layout = Layout(name, buffer);
  return layout.expect(p.batch_shape, {p.heads, p.seq_q}, full_batch);
}

inline ffi::Error decode_forward(const Operands& in, const ffi::Dictionary& attributes,
                                 ffi::AnyBuffer out, ffi::AnyBuffer lse, ForwardParams& p) {
  Packing packing;
  JAX_FLASH_RETURN_IF_ERROR(decode(in, attributes, out.dimensions(), p, packing));
  const Layout o("out", out);
  JAX_FLASH_RETURN_IF_ERROR(
      o.expect(p.batch_shape, {p.seq_q, p.heads, p.value_dim}, /*full_batch=*/true));
  if (out.element_type() != in.query.element_type()) {
    return bad_argument("out", in.query.element_type(), out.element_type());
  }
  p.o = tensor_view<void>(o, out.untyped_data());
  Layout rows("lse", lse);
  JAX_FLASH_RETURN_IF_ERROR(rows_of("lse", lse, p, /*full_batch=*/true, rows));
  p.lse = row_view<float>(rows, static_cast<float*>(lse.untyped_data()));
  return ffi::Error::Success();
}

struct BackwardBuffers {
  ffi::AnyBuffer out, lse, dout, dlse;   // operands
  ffi::AnyBuffer dq, dk, dv, workspace;  // results
};

inline ffi::Error decode_backward(const Operands& in, const BackwardBuffers& b,
                                  const ffi::Dictionary& attributes, BackwardParams& p) {
  Packing packing;
  JAX_FLASH_RETURN_IF_ERROR(decode(in, attributes, b.dq.dimensions(), p, packing));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "deterministic", p.deterministic));
  for (const auto* buffer : {&b.out, &b.dout, &b.dq}) {
    if (buffer->element_type() != in.query.element_type()) {
      return bad_argument("out, dout, dq", in.query.element_type(), buffer->element_type());
    }
  }
  const Layout o("out", b.out), dout("dout", b.dout);
  JAX_FLASH_RETURN_IF_ERROR(o.expect(p.batch_shape, {p.seq_q, p.heads, p.value_dim}));
  JAX_FLASH_RETURN_IF_ERROR(dout.expect(p.batch_shape, {p.seq_q, p.heads, p.value_dim}));
  p.o = tensor_view<const void>(o, b.out.untyped_data());
  p.dout = tensor_view<const void>(dout, b.dout.untyped_data());

  Layout rows("lse", b.lse);
  JAX_FLASH_RETURN_IF_ERROR(rows_of("lse", b.lse, p, false, rows));
  p.lse = row_view<const float>(rows, static_cast<const float*>(b.lse.untyped_data()));
  if (!is_empty(b.dlse)) {
    JAX_FLASH_RETURN_IF_ERROR(rows_of("dlse", b.dlse, p, false, rows));
    p.dlse = row_view<const float>(rows, static_cast<const float*>(b.dlse.untyped_data()));
  }

  const int64_t bytes = item_bytes(p.dtype);
  const Layout dq("dq", b.dq);
  void* dq_data = b.dq.untyped_data();
  if (packing == Packing::kQueryKeyValue) {
    JAX_FLASH_RETURN_IF_ERROR(dq.expect(p.batch_shape, {p.seq_q, 3, p.heads, p.head_dim}, true));
    p.dq = tensor_view<void>(dq, dq_data, 0, bytes);
    p.dk = tensor_view<void>(dq, dq_data, 1, bytes);
    p.dv = tensor_view<void>(dq, dq_data, 2, bytes);
  } else {
    JAX_FLASH_RETURN_IF_ERROR(dq.expect(p.batch_shape, {p.seq_q, p.heads, p.head_dim}, true));
    p.dq = tensor_view<void>(dq, dq_data);
    const Layout dk("dk", b.dk);
    if (b.dk.element_type() != in.query.element_type()) {
      return bad_argument("dk", in.query.element_type(), b.dk.element_type());
    }
    if (packing == Packing::kKeyValue) {
      JAX_FLASH_RETURN_IF_ERROR(
          dk.expect(p.batch_shape, {p.seq_k, 2, p.kv_heads, p.head_dim}, true));
      p.dk = tensor_view<void>(dk, b.dk.untyped_data(), 0, bytes);
      p.dv = tensor_view<void>(dk, b.dk.untyped_data(), 1, bytes);
    } else {
      const Layout dv("dv", b.dv);
      if (b.dv.element_type() != in.query.element_type()) {
        return bad_argument("dv", in.query.element_type(), b.dv.element_type());
      }
      JAX_FLASH_RETURN_IF_ERROR(dk.expect(p.batch_shape, {p.seq_k, p.kv_heads, p.head_dim}, true));
      JAX_FLASH_RETURN_IF_ERROR(dv.expect(p.batch_shape, {p.seq_k, p.kv_heads, p.value_dim}, true));
      p.dk = tensor_view<void>(dk, b.dk.untyped_data());
      p.dv = tensor_view<void>(dv, b.dv.untyped_data());
    }
  }
  p.workspace = b.workspace.untyped_data();
  p.workspace_bytes = static_cast<int64_t>(b.workspace.size_bytes());
  return ffi::Error::Success();
}

// The buffers in the order of _ops/attention.py.

inline ffi::Error decode_forward(const CallFrame& call, ForwardParams& p) {
  const auto& in = call.operands;
  const Operands operands{in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8]};
  return decode_forward(operands, call.attributes, call.results[0], call.results[1], p);
}

inline ffi::Error decode_backward(const CallFrame& call, BackwardParams& p) {
  const auto& in = call.operands;
  const auto& out = call.results;
  const Operands operands{in[0], in[1], in[2], in[7], in[8], in[9], in[10], in[11], in[12]};
  const BackwardBuffers buffers{in[3], in[4], in[5], in[6], out[0], out[1], out[2], out[3]};
  return decode_backward(operands, buffers, call.attributes, p);
}

}  // namespace jax_flash::attention
