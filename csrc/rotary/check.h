// XLA buffers -> Params, with every shape and type checked on the way, in the order of
// _ops/rotary.py.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "rotary/params.h"

namespace jax_flash::rotary {

inline ffi::Error decode_table(const char* name, const ffi::AnyBuffer& cos,
                               const ffi::AnyBuffer& sin, Params& p, Table& table) {
  const auto dims = cos.dimensions();
  if (dims.size() != kBatchDims + 2) return bad_argument(name, "5 axes", to_string(dims));
  const int64_t length = dims[kBatchDims], pairs = dims[kBatchDims + 1];
  if (table.cos.data == nullptr && p.pairs == 0) {
    p.length = length;
    p.pairs = static_cast<int32_t>(pairs);
    if (length < 1 || pairs < 1 || 2 * pairs > p.head_dim) {
      return bad_argument(name, "1 to head_dim / 2 pairs of a position", to_string(dims));
    }
  }
  JAX_FLASH_RETURN_IF_ERROR(
      per_batch(name, cos, ffi::F32, p.batch_shape, {p.length, p.pairs}, table.cos));
  return per_batch(name, sin, ffi::F32, p.batch_shape, {p.length, p.pairs}, table.sin);
}

// What all arrays have in common, by the first one, `x` of this rank.
inline ffi::Error decode_problem(const CallFrame& call, size_t rank, Params& p) {
  const ffi::AnyBuffer& x = call.operands[0];
  const auto dtype = to_dtype(x.element_type());
  if (!dtype) return bad_argument("x", "float32, float16 or bfloat16", x.element_type());
  p.dtype = *dtype;
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "interleaved", p.is_interleaved));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "conjugate", p.is_conjugate));
  const auto dims = x.dimensions();
  if (dims.size() != rank) return bad_argument("x", rank, to_string(dims));
  std::copy_n(dims.begin(), kBatchDims, p.batch_shape);
  p.rows = dims[kBatchDims];
  p.head_dim = static_cast<int32_t>(std::min<int64_t>(dims[rank - 1], INT32_MAX));
  if (p.batch_shape[0] * p.batch_shape[1] * p.batch_shape[2] <= UINT32_MAX) {
    return ffi::Error::Success();
  }
  return bad_argument("x", "less than 2^32 batch entries", to_string(dims));
}

// Queries or keys [batch, rows, heads, head_dim]; `of_row`: 3 where they are the first of three.
inline ffi::Error decode_heads(const CallFrame& call, int which, int64_t of_row, Params& p,
                               Heads& heads) {
  const ffi::AnyBuffer &x = call.operands[which], &out = call.results[which];
  const auto type = call.operands[0].element_type();
  for (const ffi::AnyBuffer* buffer : {&x, &out}) {
    if (buffer->element_type() != type) return bad_argument("x", type, buffer->element_type());
    const auto dims = buffer->dimensions();
    if (dims.size() < 2) return bad_argument("x", "heads", to_string(dims));
    const int64_t count = dims[dims.size() - 2];
    if (3 * count * p.head_dim > INT32_MAX) {
      return bad_argument("x", "rows of less than 2^31 elements", to_string(dims));
    }
    if (buffer == &x) heads.count = static_cast<int32_t>(count);
    const Layout layout("x", *buffer);
    JAX_FLASH_RETURN_IF_ERROR(
        of_row == 3 ? layout.expect(p.batch_shape, {p.rows, 3, heads.count, p.head_dim}, true)
                    : layout.expect(p.batch_shape, {p.rows, heads.count, p.head_dim}, true));
  }
  heads.x = x.untyped_data();
  heads.out = out.untyped_data();
  heads.row_size = of_row * heads.count * p.head_dim;
  return ffi::Error::Success();
}

// Operands from `at` on: cos, sin, cos_k, sin_k (both or neither), positions (or off).
inline ffi::Error decode_places(const CallFrame& call, size_t at, Params& p) {
  const ffi::AnyBuffer* in = &call.operands[at];
  JAX_FLASH_RETURN_IF_ERROR(decode_table("cos", in[0], in[1], p, p.heads[0].table));
  p.heads[1].table = p.heads[0].table;
  if (!is_empty(in[2])) {
    JAX_FLASH_RETURN_IF_ERROR(decode_table("cos_k", in[2], in[3], p, p.heads[1].table));
  }
  if (is_empty(in[4])) return ffi::Error::Success();
  return per_batch("positions", in[4], ffi::S32, p.batch_shape, {p.rows}, p.positions);
}

inline ffi::Error decode(const CallFrame& call, Params& p) {
  bool is_packed;
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "packed", is_packed));
  JAX_FLASH_RETURN_IF_ERROR(decode_problem(call, kBatchDims + (is_packed ? 4 : 3), p));
  Heads &queries = p.heads[0], &keys = p.heads[1];
  JAX_FLASH_RETURN_IF_ERROR(decode_heads(call, 0, is_packed ? 3 : 1, p, queries));
  JAX_FLASH_RETURN_IF_ERROR(decode_places(call, 1, p));
  if (!is_packed) return ffi::Error::Success();
  if (queries.x != queries.out) {
    return bad_argument("out", "the memory of packed x", "other memory");
  }
  p.kinds = 2;
  keys.count = queries.count;
  keys.row_size = queries.row_size;
  const int64_t bytes = int64_t{queries.count} * p.head_dim * item_bytes(p.dtype);
  keys.x = static_cast<const char*>(queries.x) + bytes;
  keys.out = static_cast<char*>(queries.out) + bytes;
  return ffi::Error::Success();
}

inline ffi::Error decode_pair(const CallFrame& call, Params& p) {
  p.kinds = 2;
  JAX_FLASH_RETURN_IF_ERROR(decode_problem(call, kBatchDims + 3, p));
  for (int kind = 0; kind < 2; ++kind) {
    JAX_FLASH_RETURN_IF_ERROR(decode_heads(call, kind, 1, p, p.heads[kind]));
  }
  return decode_places(call, 2, p);
}

}  // namespace jax_flash::rotary
