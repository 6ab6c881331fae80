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

inline ffi::Error decode(const CallFrame& call, Params& p) {
  const ffi::AnyBuffer &x = call.operands[0], &out = call.results[0];
  const auto dtype = to_dtype(x.element_type());
  if (!dtype) return bad_argument("x", "float32, float16 or bfloat16", x.element_type());
  if (out.element_type() != x.element_type()) {
    return bad_argument("out", x.element_type(), out.element_type());
  }
  p.dtype = *dtype;
  bool is_packed;
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "interleaved", p.is_interleaved));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "conjugate", p.is_conjugate));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "packed", is_packed));

  const auto dims = x.dimensions();
  const size_t rank = kBatchDims + (is_packed ? 4 : 3);
  if (dims.size() != rank) return bad_argument("x", rank, to_string(dims));
  std::copy_n(dims.begin(), kBatchDims, p.batch_shape);
  p.rows = dims[kBatchDims];
  const int64_t heads = dims[rank - 2], head_dim = dims[rank - 1];
  const int64_t entries = p.batch_shape[0] * p.batch_shape[1] * p.batch_shape[2];
  if (entries > UINT32_MAX || 3 * heads * head_dim > INT32_MAX) {
    return bad_argument("x", "rows of less than 2^31 elements", to_string(dims));
  }
  p.heads = static_cast<int32_t>(heads);
  p.head_dim = static_cast<int32_t>(head_dim);
  const Layout layout("x", x), out_layout("out", out);
  if (is_packed) {
    p.kinds = 2;
    JAX_FLASH_RETURN_IF_ERROR(layout.expect(p.batch_shape, {p.rows, 3, heads, head_dim}, true));
    JAX_FLASH_RETURN_IF_ERROR(out_layout.expect(p.batch_shape, {p.rows, 3, heads, head_dim}, true));
    if (x.untyped_data() != out.untyped_data()) {
      return bad_argument("out", "the memory of packed x", "other memory");
    }
  } else {
    JAX_FLASH_RETURN_IF_ERROR(layout.expect(p.batch_shape, {p.rows, heads, head_dim}, true));
    JAX_FLASH_RETURN_IF_ERROR(out_layout.expect(p.batch_shape, {p.rows, heads, head_dim}, true));
  }
  p.x = x.untyped_data();
  p.out = out.untyped_data();

  const auto& in = call.operands;
  JAX_FLASH_RETURN_IF_ERROR(decode_table("cos", in[1], in[2], p, p.tables[0]));
  p.tables[1] = p.tables[0];
  if (!is_empty(in[3])) {
    JAX_FLASH_RETURN_IF_ERROR(decode_table("cos_k", in[3], in[4], p, p.tables[1]));
  }
  return per_batch("positions", in[5], ffi::S32, p.batch_shape, {p.rows}, p.positions);
}

}  // namespace jax_flash::rotary
