// What one call of the softmax over scores in memory is, independent of XLA.
//
//   forward:   P = softmax(scale * S over the columns that a row sees)
//   backward:  dS = scale * P * (dP - rowsum(dP * P)),  0 where P is
//
// A row sees the columns that neither its mask row hides nor lie beyond its causal limit.
#pragma once

#include <cstdint>

#include "common/batch.h"
#include "common/dtype.h"

namespace jax_flash::softmax {

struct Problem {
  DType dtype = DType::kF32;
  int64_t batch_shape[kBatchDims] = {1, 1, 1};
  int64_t seq_q = 0;    // rows of a batch entry
  int64_t rows = 0;     // of all entries
  int32_t columns = 0;  // of a row
  float scale = 1.0f;
  const int32_t* row_ids = nullptr;  // [seq_q]: a row sees the columns up to its id; null: all
};

struct ForwardParams : Problem {
  const void* scores = nullptr;  // [batch, seq_q, columns]
  PerBatch<uint8_t> mask;        // [batch, seq_q or 1, columns]: not 0 is hidden
  int64_t mask_row_stride = 0;
  void* probs = nullptr;  // [batch, seq_q, columns]
};

struct BackwardParams : Problem {
  const void* probs = nullptr;  // [batch, seq_q, columns], as are the next two
  const void* dprobs = nullptr;
  void* dscores = nullptr;  // may be dprobs
};

}  // namespace jax_flash::softmax
