// XLA's element types -> ours, once, at the border.
#pragma once

#include <optional>

#include "attention/params.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flash {

inline std::optional<attention::DType> to_dtype(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::F32:
      return attention::DType::kF32;
    case xla::ffi::F16:
      return attention::DType::kF16;
    case xla::ffi::BF16:
      return attention::DType::kBF16;
    default:
      return std::nullopt;
  }
}

}  // namespace jax_flash
