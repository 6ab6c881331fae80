// Rows of all batch entries counted through -> the entry and the row in it, by divisors that the
// host has prepared: a division by a number that nobody knows takes some twenty instructions, each
// of which waits for the one before, and they would stand before a short kernel's first load.
#pragma once

#include "device/batch.cuh"

namespace jax_flash::device {

// x / d for 0 <= x < 2^31 and 0 < d < 2^31: Granlund and Montgomery, "Division by invariant
// integers using multiplication", figure 4.1. That x is less than 2^31 keeps the sum within 32
// bits.
struct Divisor {
  uint32_t value = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift) < value) ++shift;
    const uint64_t above = (uint64_t{1} << shift) - value;
    multiplier = static_cast<uint32_t>((above << 32) / value + 1);
  }

  __device__ __forceinline__ uint32_t divide(uint32_t x, uint32_t& remainder) const {
    const uint32_t quotient = (__umulhi(x, multiplier) + x) >> shift;
    remainder = x - quotient * value;
    return quotient;
  }
};

struct Place {
  BatchIndex batch;
  int64_t row;  // of the batch entry
};

class Places {
 public:
  // `rows`: of a batch entry.
  Places(const int64_t (&batch_shape)[kBatchDims], int64_t rows) : rows_(rows) {
    for (int i = 0; i < kBatchDims; ++i) shape_[i] = batch_shape[i];
    is_small_ = shape_[0] * shape_[1] * shape_[2] * rows <= INT32_MAX;
    if (!is_small_) return;
    by_rows_ = Divisor(rows);
    by_axis_[0] = Divisor(shape_[1]);
    by_axis_[1] = Divisor(shape_[2]);
  }

  __device__ __forceinline__ Place of(int64_t flat) const {
    Place place;
    if (is_small_) {
      uint32_t row, entry = by_rows_.divide(static_cast<uint32_t>(flat), row);
      place.row = row;
      entry = by_axis_[1].divide(entry, place.batch.axis[2]);
      place.batch.axis[0] = by_axis_[0].divide(entry, place.batch.axis[1]);
    } else {
      const int64_t entry = flat / rows_;
      place.row = flat % rows_;
      place.batch.axis[2] = entry % shape_[2];
      place.batch.axis[1] = entry / shape_[2] % shape_[1];
      place.batch.axis[0] = entry / shape_[2] / shape_[1];
    }
    return place;
  }

 private:
  int64_t shape_[kBatchDims], rows_;
  bool is_small_;
  Divisor by_rows_, by_axis_[kBatchDims - 1];
};

}  // namespace jax_flash::device
