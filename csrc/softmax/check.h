// XLA buffers -> ForwardParams / BackwardParams, with every shape and type checked on the way, in
// the order of _ops/softmax.py.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "softmax/params.h"

namespace jax_flash::softmax {

// A [batch, seq_q, columns] array that has every batch entry; it starts on 16 bytes, as the kernels
// go through it.
inline ffi::Error whole(const char* name, const ffi::AnyBuffer& buffer, const Problem& p,
                        ffi::DataType type) {
  if (buffer.element_type() != type) return bad_argument(name, type, buffer.element_type());
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 != 0) {
    return bad_argument(name, "an address that is a multiple of 16", buffer.untyped_data());
  }
  return Layout(name, buffer).expect(p.batch_shape, {p.seq_q, p.columns}, /*full_batch=*/true);
}

// Sizes, from a result of the call.
inline ffi::Error decode(const CallFrame& call, const ffi::AnyBuffer& row_ids, Problem& p) {
  const ffi::AnyBuffer& out = call.results[0];
  const auto dtype = to_dtype(out.element_type());
  if (!dtype) return bad_argument("scores", "float32, float16 or bfloat16", out.element_type());
  p.dtype = *dtype;
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "scale", p.scale));
  const auto dims = out.dimensions();
  if (dims.size() != kBatchDims + 2) return bad_argument("scores", "5 axes", to_string(dims));
  std::copy_n(dims.begin(), kBatchDims, p.batch_shape);
  p.seq_q = dims[kBatchDims];
  const int64_t columns = dims[kBatchDims + 1];
  const int64_t entries = p.batch_shape[0] * p.batch_shape[1] * p.batch_shape[2];
  if (columns > INT32_MAX / 2 || entries > UINT32_MAX) {
    return bad_argument("scores", "at most 2^30 columns and 2^32 batch entries", to_string(dims));
  }
  p.columns = static_cast<int32_t>(columns);
  p.rows = entries * p.seq_q;
  if (is_empty(row_ids)) return ffi::Error::Success();
  const auto ids = row_ids.dimensions();
  if (row_ids.element_type() != ffi::S32 || ids.size() != 1 || ids[0] != p.seq_q) {
    return bad_argument("row_ids", "int32 [rows]", to_string(ids));
  }
  p.row_ids = static_cast<const int32_t*>(row_ids.untyped_data());
  return ffi::Error::Success();
}

inline ffi::Error decode_forward(const CallFrame& call, ForwardParams& p) {
  const ffi::AnyBuffer &scores = call.operands[0], &mask = call.operands[1];
  const ffi::AnyBuffer& probs = call.results[0];
  JAX_FLASH_RETURN_IF_ERROR(decode(call, call.operands[2], p));
  JAX_FLASH_RETURN_IF_ERROR(whole("scores", scores, p, probs.element_type()));
  JAX_FLASH_RETURN_IF_ERROR(whole("probs", probs, p, probs.element_type()));
  p.scores = scores.untyped_data();
  p.probs = probs.untyped_data();
  if (is_empty(mask)) return ffi::Error::Success();
  const auto dims = mask.dimensions();
  if (dims.size() != kBatchDims + 2) return bad_argument("mask", "5 axes", to_string(dims));
  const ffi::DataType type = mask.element_type();
  if (type != ffi::PRED && type != ffi::U8) return bad_argument("mask", "bool or uint8", type);
  const bool is_row = dims[kBatchDims] == 1;  // one for all rows
  JAX_FLASH_RETURN_IF_ERROR(
      per_batch("mask", mask, type, p.batch_shape, {is_row ? 1 : p.seq_q, p.columns}, p.mask));
  p.mask_row_stride = is_row ? 0 : p.columns;
  return ffi::Error::Success();
}

inline ffi::Error decode_backward(const CallFrame& call, BackwardParams& p) {
  const ffi::AnyBuffer &probs = call.operands[0], &dprobs = call.operands[1];
  const ffi::AnyBuffer& dscores = call.results[0];
  JAX_FLASH_RETURN_IF_ERROR(decode(call, call.operands[2], p));
  JAX_FLASH_RETURN_IF_ERROR(whole("probs", probs, p, dscores.element_type()));
  JAX_FLASH_RETURN_IF_ERROR(whole("dprobs", dprobs, p, dscores.element_type()));
  JAX_FLASH_RETURN_IF_ERROR(whole("dscores", dscores, p, dscores.element_type()));
  p.probs = probs.untyped_data();
  p.dprobs = dprobs.untyped_data();
  p.dscores = dscores.untyped_data();
  return ffi::Error::Success();
}

}  // namespace jax_flash::softmax
