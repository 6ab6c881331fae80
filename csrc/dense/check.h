// XLA buffers -> Params, with every shape and type checked on the way. Python checks first and with
// better words; these checks are what stands between a wrong caller and somebody else's memory.
#pragma once

#include "common/handler.h"
#include "dense/params.h"

namespace jax_flash::dense {

inline constexpr int64_t kWidthMultiple = 8;

// A matrix of the call's type -> its address.
inline ffi::Error decode_matrix(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                                int64_t rows, int64_t columns, void*& out) {
  const auto dims = buffer.dimensions();
  if (buffer.element_type() != type) return bad_argument(name, type, buffer.element_type());
  if (dims.size() != 2 || dims[0] != rows || dims[1] != columns) {
    return bad_argument(name, "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]",
                        to_string(dims));
  }
  out = buffer.untyped_data();
  return ffi::Error::Success();
}

// What both directions have: x, the weight, the result and the workspace, which comes last.
inline ffi::Error decode_product(const CallFrame& call, bool is_forward, Params& p) {
  p = {};
  p.is_forward = is_forward;
  const ffi::AnyBuffer &x = call.operands[0], &weight = call.operands[1];
  const auto dtype = to_dtype(x.element_type());
  if (!dtype || *dtype == DType::kF32) {
    return bad_argument("x", "bfloat16 or float16", x.element_type());
  }
  p.dtype = *dtype;
  const auto dims = x.dimensions(), sides = weight.dimensions();
  if (dims.size() != 2 || sides.size() != 2) {
    return bad_argument("weight", "x and weight of two axes", to_string(sides));
  }
  p.rows = dims[0];
  p.inputs = dims[1];
  p.outputs = sides[is_forward ? 1 : 0];
  if (p.rows < 1 || p.inputs < 1 || p.outputs < 1 || p.inputs % kWidthMultiple != 0 ||
      p.outputs % kWidthMultiple != 0) {
    return bad_argument("weight", "sides that are multiples of 8, not 0", to_string(sides));
  }
  const ffi::DataType type = x.element_type();
  void *x_data, *weight_data;
  JAX_FLASH_RETURN_IF_ERROR(decode_matrix("x", x, type, p.rows, p.inputs, x_data));
  JAX_FLASH_RETURN_IF_ERROR(decode_matrix("weight", weight, type, is_forward ? p.inputs : p.outputs,
                                          is_forward ? p.outputs : p.inputs, weight_data));
  p.x = x_data;
  p.weight = weight_data;
  JAX_FLASH_RETURN_IF_ERROR(decode_matrix("out", call.results[0], type, p.rows, p.outputs, p.out));
  const ffi::AnyBuffer& workspace = call.results.back();
  p.workspace = workspace.untyped_data();
  p.workspace_bytes = static_cast<int64_t>(workspace.size_bytes());
  return ffi::Error::Success();
}

inline ffi::Error decode_forward(const CallFrame& call, Params& p) {
  JAX_FLASH_RETURN_IF_ERROR(decode_product(call, true, p));
  const ffi::DataType type = call.operands[0].element_type();
  const ffi::AnyBuffer &bias = call.operands[2], &pre = call.results[1];
  if (!is_empty(bias)) {
    const auto dims = bias.dimensions();
    if (bias.element_type() != type || dims.size() != 1 || dims[0] != p.outputs) {
      return bad_argument("bias", "[" + std::to_string(p.outputs) + "] of x's type",
                          to_string(dims));
    }
    p.bias = bias.untyped_data();
  }
  if (is_empty(pre)) return ffi::Error::Success();
  return decode_matrix("pre", pre, type, p.rows, p.outputs, p.pre);
}

inline ffi::Error decode_backward(const CallFrame& call, Params& p) {
  JAX_FLASH_RETURN_IF_ERROR(decode_product(call, false, p));
  return decode_matrix("pre", call.operands[2], call.operands[0].element_type(), p.rows, p.outputs,
                       p.pre);
}

}  // namespace jax_flash::dense
