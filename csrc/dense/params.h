// What one product with GELU (tanh) in its epilogue is, independent of XLA.
//
//   forward    pre = x W + bias,   out = gelu(pre)
//   backward   out = (x W^T) * gelu'(pre)
//
// All arrays are dense and row-major, of one 16-bit type; products accumulate in float32, and pre
// is rounded only where it is written. Widths are multiples of 8.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jax_flash::dense {

struct Params {
  DType dtype;
  bool is_forward;
  int64_t rows, inputs, outputs;
  const void* x;       // [rows, inputs]
  const void* weight;  // forward [inputs, outputs], backward [outputs, inputs]
  const void* bias;    // [outputs], or null; forward
  void* pre;           // [rows, outputs]: forward a result, or null; backward an operand
  void* out;           // [rows, outputs]
  void* workspace;
  int64_t workspace_bytes;
};

}  // namespace jax_flash::dense
