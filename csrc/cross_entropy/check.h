// XLA buffers -> ForwardParams / BackwardParams, with every shape and type checked on the way.
// Python checks first and with better words; these checks are what stands between a wrong caller
// and somebody else's memory.
#pragma once

#include "common/handler.h"
#include "cross_entropy/params.h"

namespace jax_flash::cross_entropy {

inline constexpr int64_t kMaxVocabulary = INT64_C(1) << 30;  // columns are int32 in the kernels

inline ffi::Error expect_aligned(const char* name, const ffi::AnyBuffer& buffer) {
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 == 0) return ffi::Error::Success();
  return bad_argument(name, "an address that is a multiple of 16", buffer.untyped_data());
}

// A number a row.
template <typename T>
ffi::Error decode_rows(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                       int64_t rows, T*& out) {
  const auto dims = buffer.dimensions();
  if (buffer.element_type() != type) return bad_argument(name, type, buffer.element_type());
  if (dims.size() != 1 || dims[0] != rows) {
    return bad_argument(name, "[" + std::to_string(rows) + "]", to_string(dims));
  }
  out = static_cast<T*>(buffer.untyped_data());
  return ffi::Error::Success();
}

template <typename T>
ffi::Error decode_rows_or_off(const char* name, const ffi::AnyBuffer& buffer, int64_t rows,
                              T*& out) {
  out = nullptr;
  if (is_empty(buffer)) return ffi::Error::Success();
  return decode_rows(name, buffer, ffi::F32, rows, out);
}

inline ffi::Error decode_problem(const CallFrame& call, Problem& p) {
  const ffi::AnyBuffer& logits = call.operands[0];
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "scale", p.scale));
  const auto dtype = to_dtype(logits.element_type());
  if (!dtype) {
    return bad_argument("logits", "float32, float16 or bfloat16", logits.element_type());
  }
  p.dtype = *dtype;
  const auto dims = logits.dimensions();
  if (dims.size() != 2 || dims[1] < 1 || dims[1] > kMaxVocabulary) {
    return bad_argument("logits", "[rows, 1 to 2^30 classes]", to_string(dims));
  }
  p.rows = dims[0];
  p.vocabulary = static_cast<int32_t>(dims[1]);
  p.logits = logits.untyped_data();
  JAX_FLASH_RETURN_IF_ERROR(expect_aligned("logits", logits));
  return decode_rows("labels", call.operands[1], ffi::S32, p.rows, p.labels);
}

inline ffi::Error decode_forward(const CallFrame& call, ForwardParams& p) {
  JAX_FLASH_RETURN_IF_ERROR(decode_problem(call, p));
  JAX_FLASH_RETURN_IF_ERROR(decode_rows("lse", call.results[0], ffi::F32, p.rows, p.lse));
  JAX_FLASH_RETURN_IF_ERROR(
      decode_rows("label_logit", call.results[1], ffi::F32, p.rows, p.label_logit));
  return decode_rows_or_off("total", call.results[2], p.rows, p.total);
}

// Where the gradient goes.
inline ffi::Error decode_dlogits(const ffi::AnyBuffer& dlogits, BackwardParams& p) {
  const auto dims = dlogits.dimensions();
  const bool more_rows = dims.size() == 2 && dims[0] > p.rows && p.rows % 8 == 0;
  if (dims.size() != 2 || (dims[0] != p.rows && !more_rows) || dims[1] != p.vocabulary) {
    return bad_argument("dlogits", "logits' shape, or more rows than a multiple of 8",
                        to_string(dims));
  }
  const auto result = to_dtype(dlogits.element_type());
  if (!result || (*result != p.dtype && p.dtype != DType::kF32)) {
    return bad_argument("dlogits", "logits' type, or a narrower one than float32",
                        dlogits.element_type());
  }
  p.result = *result;
  p.dlogits = dlogits.untyped_data();
  p.result_rows = dims[0];
  return expect_aligned("dlogits", dlogits);
}

inline ffi::Error decode_backward(const CallFrame& call, BackwardParams& p) {
  JAX_FLASH_RETURN_IF_ERROR(decode_problem(call, p));
  JAX_FLASH_RETURN_IF_ERROR(decode_rows("lse", call.operands[2], ffi::F32, p.rows, p.lse));
  JAX_FLASH_RETURN_IF_ERROR(decode_rows("dlse", call.operands[3], ffi::F32, p.rows, p.dlse));
  JAX_FLASH_RETURN_IF_ERROR(decode_rows("dlabel", call.operands[4], ffi::F32, p.rows, p.dlabel));
  JAX_FLASH_RETURN_IF_ERROR(decode_rows_or_off("dtotal", call.operands[5], p.rows, p.dtotal));
  return decode_dlogits(call.results[0], p);
}

inline ffi::Error decode_gradients(const CallFrame& call, ForwardParams& forward,
                                   BackwardParams& backward) {
  JAX_FLASH_RETURN_IF_ERROR(decode_forward(call, forward));
  static_cast<Problem&>(backward) = forward;
  backward.lse = forward.lse;
  Loss& loss = backward.loss;
  JAX_FLASH_RETURN_IF_ERROR(
      decode_rows("row_weights", call.operands[2], ffi::F32, forward.rows, loss.row_weights));
  JAX_FLASH_RETURN_IF_ERROR(
      decode_rows("first_row", call.operands[3], ffi::S32, 1, backward.first_row));
  JAX_FLASH_RETURN_IF_ERROR(
      read_attribute(call.attributes, "label_smoothing", loss.label_smoothing));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "z_loss", loss.z_loss));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(call.attributes, "classes", loss.classes));
  return decode_dlogits(call.results[3], backward);
}

}  // namespace jax_flash::cross_entropy
