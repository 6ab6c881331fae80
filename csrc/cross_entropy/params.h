// What one cross-entropy call is, independent of XLA.
//
//   z = scale * logits,   lse = log sum_v exp(z_v),   label_logit = z_label,   total = sum_v z_v
//   dlogits_v = scale * (dlse * exp(z_v - lse) + dlabel * [v = label] + dtotal)
//
// Rows are dense and need not start at a multiple of 16 bytes. A label outside of [0, vocabulary)
// is no class of these columns.
#pragma once

#include <climits>
#include <cstdint>

#include "common/dtype.h"

namespace jax_flash::cross_entropy {

// The label of a row that counts for nothing and that nobody reads: its lse is +inf, so that
// exp(z - lse) is 0, its other statistics are 0.
inline constexpr int32_t kIgnored = INT_MIN;

struct Problem {
  DType dtype;
  int64_t rows;
  int32_t vocabulary;
  float scale;
  const void* logits;     // [rows, vocabulary]
  const int32_t* labels;  // [rows]
};

struct ForwardParams : Problem {
  float *lse, *label_logit;  // [rows]
  float* total;              // [rows], or null: not wanted
};

// The loss of a row, (1 - smoothing) * (lse - label_logit) + smoothing * (lse - total / classes) +
// z_loss * lse^2, for those who want the gradient of sum(row_weights * loss).
struct Loss {
  const float* row_weights = nullptr;  // [rows]; null: cotangents are given
  float label_smoothing, z_loss, classes;
};

struct BackwardParams : Problem {
  const float* lse;                                // [rows]
  const float *dlse = nullptr, *dlabel = nullptr;  // [rows]
  const float* dtotal = nullptr;                   // [rows], or null: zero
  Loss loss;                                       // instead of these three
  DType result;                                    // of dlogits
  void* dlogits;                       // [result_rows, vocabulary]; may be logits itself
  int64_t result_rows;                 // at least rows
  const int32_t* first_row = nullptr;  // on the device: where rows begin there, a multiple of 8
};

}  // namespace jax_flash::cross_entropy
