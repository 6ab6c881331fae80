// Checks of a buffer's shape that leave its strides: every operand has exactly kBatchDims leading
// batch axes, each 1 or the full size.
#pragma once

#include <initializer_list>
#include <vector>

#include "common/batch.h"
#include "common/handler.h"

namespace jax_flash {

// Walks one buffer's axes: batch axes become strides, the rest must match `tail` exactly.
class Layout {
 public:
  Layout(const char* name, const ffi::AnyBuffer& buffer) : name_(name), dims_(buffer.dimensions()) {
    strides_.resize(dims_.size());
    int64_t stride = 1;
    for (size_t axis = dims_.size(); axis-- > 0; stride *= dims_[axis]) strides_[axis] = stride;
  }

  ffi::Error expect(const int64_t (&batch_shape)[kBatchDims], std::initializer_list<int64_t> tail,
                    bool full_batch = false) const {
    bool matches = dims_.size() == kBatchDims + tail.size();
    for (int axis = 0; matches && axis < kBatchDims; ++axis) {
      matches = dims_[axis] == batch_shape[axis] || (dims_[axis] == 1 && !full_batch);
    }
    size_t axis = kBatchDims;
    if (matches) {
      for (int64_t size : tail) matches = matches && dims_[axis++] == size;
    }
    if (matches) return ffi::Error::Success();
    std::vector<int64_t> expected(batch_shape, batch_shape + kBatchDims);
    expected.insert(expected.end(), tail.begin(), tail.end());
    return bad_argument(name_,
                        to_string({expected.data(), expected.size()}) + " (batch axes may be 1)",
                        to_string(dims_));
  }

  BatchStrides batch() const {
    BatchStrides result;
    for (int axis = 0; axis < kBatchDims; ++axis) {
      result.stride[axis] = dims_[axis] == 1 ? 0 : strides_[axis];
    }
    return result;
  }
  int64_t stride(size_t tail_axis) const { return strides_[kBatchDims + tail_axis]; }

 private:
  const char* name_;
  ffi::Span<const int64_t> dims_;
  std::vector<int64_t> strides_;
};

template <typename T>
ffi::Error per_batch(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                     const int64_t (&batch_shape)[kBatchDims], std::initializer_list<int64_t> tail,
                     PerBatch<T>& out) {
  if (is_empty(buffer)) return ffi::Error::Success();
  if (buffer.element_type() != type) return bad_argument(name, type, buffer.element_type());
  const Layout layout(name, buffer);
  JAX_FLASH_RETURN_IF_ERROR(layout.expect(batch_shape, tail));
  out.data = static_cast<const T*>(buffer.untyped_data());
  out.batch = layout.batch();
  return ffi::Error::Success();
}

}  // namespace jax_flash
