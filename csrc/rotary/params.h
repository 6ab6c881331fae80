// What one call of the rotary embedding is, independent of XLA.
//
//   out1 = x1 cos - x2 sin,  out2 = x1 sin + x2 cos     for the pairs (x1, x2) of each head
//
// A row at position p takes row p of the tables; at p < 0 it is copied, at p >= length it is NaN.
// Elements beyond the pairs are copied.
#pragma once

#include <cstdint>

#include "common/batch.h"
#include "common/dtype.h"

namespace jax_flash::rotary {

struct Table {
  PerBatch<float> cos, sin;  // [batch, length, pairs]
};

// The heads of one kind, queries or keys: [batch, rows, heads, head_dim], a row `row_size` elements
// after the one before.
struct Heads {
  const void* x = nullptr;
  void* out = nullptr;  // alike; may be x
  int32_t count = 0;
  int64_t row_size = 0;
  Table table;
};

struct Params {
  DType dtype = DType::kF32;
  bool is_interleaved = false;  // pairs (2 j, 2 j + 1), not (j, j + pairs)
  bool is_conjugate = false;    // sin counts with the other sign
  int64_t batch_shape[kBatchDims] = {1, 1, 1};
  int64_t rows = 0;  // of a batch entry
  int32_t head_dim = 0;
  int32_t pairs = 0;   // of a head that are turned
  int64_t length = 0;  // of the tables
  int32_t kinds = 1;   // 2: queries and keys
  Heads heads[2];
  PerBatch<int32_t> positions;  // [batch, rows]; null: row t stands at t
};

}  // namespace jax_flash::rotary
