// What one norm over a residual stream is, independent of XLA and of the device that runs it.
//
//   s = residual + dropout(x * rowscale * layerscale) [+ dropout(x1)]
//   z = (s - mean(s)) * rsigma * weight + bias,   rsigma = 1 / sqrt(var(s) + epsilon)
//
// ffi_cuda.cc fills these structs from XLA's buffers (through check.h); the kernels read nothing
// else. What vmap maps is one axis of entries in front; an operand that all entries share has
// stride 0 there.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jax_flash::norm {

// The widest row that the kernels take.
inline constexpr int64_t kMaxWidth = 16384;

// Rows [entries, rows, width], numbers of rows [entries, rows] or vectors [entries, width], last
// axis contiguous. data == nullptr: the operand is off.
template <typename T>
struct Array {
  const T* data = nullptr;
  int64_t entry_stride = 0;  // in elements
};

struct Problem {
  DType dtype = DType::kF32;         // of x, x1, z, z1 and their gradients
  DType stream_dtype = DType::kF32;  // of residual, stream and their gradients
  DType weight_dtype = DType::kF32;  // of all vectors
  int64_t entries = 1;
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_rows = 0;    // of a compact x and dx
  int64_t out_rows = 0;  // of a compact z and dz
  float epsilon = 0.0f;
  bool is_rms = false;

  Array<void> weight, weight1, layerscale;
  Array<float> rowscale;           // [entries, rows]
  Array<int32_t> x_subset;         // [entries, rows]: row of a compact x plus 1; else no row
  Array<int32_t> out_subset;       // likewise for z
  uint32_t dropout_threshold = 0;  // 16-bit draws below it drop (common/philox.h); 0: none do
  float dropout_scale = 1.0f;      // 65536 / (65536 - threshold)
  Array<uint32_t> dropout_state;   // [entries, 4]: two words of the key, the batch word, 0
  Array<uint32_t> row_ids;         // [entries, rows]: the rows' numbers in the counters
};

// Who names a row of a compact result, [entries, 2, compact rows]: the first row, and the
// complement of the last; kNobody where none does.
using Claims = uint32_t;
inline constexpr Claims kNobody = 0xffffffffu;

struct ForwardParams : Problem {
  Array<void> x, x1, residual, bias, bias1;
  void *z = nullptr, *z1 = nullptr, *stream = nullptr;  // results; nullptr: off
  float *mean = nullptr, *rsigma = nullptr;             // of the stream as it is kept
  uint8_t *mask = nullptr, *mask1 = nullptr;
  Claims* claims = nullptr;  // of z, where out_subset is on
};

struct BackwardParams : Problem {
  Array<void> x, stream, dz, dz1, dstream;  // x: for layerscale's gradient alone
  Array<float> mean, rsigma;
  void *dx = nullptr, *dx1 = nullptr, *dresidual = nullptr;
  void *dweight = nullptr, *dbias = nullptr, *dweight1 = nullptr, *dbias1 = nullptr;
  void* dlayerscale = nullptr;
  DType sums_dtype = DType::kF32;  // of those five: float32 or that of the weights
  Claims* claims = nullptr;        // of dx, where x_subset is on
  float* partials = nullptr;       // [sums that are on, entries, num_partials, width]: each CTA's
  int64_t num_partials = 0;
};

// The sums over rows, in the order in which partials has them.
enum Sum : int { kWeight, kBias, kWeight1, kBias1, kLayerscale, kSums };

inline void* result_of(const BackwardParams& p, int sum) {
  void* const results[kSums] = {p.dweight, p.dbias, p.dweight1, p.dbias1, p.dlayerscale};
  return results[sum];
}

}  // namespace jax_flash::norm
