// The element types that the kernels know.
#pragma once

#include <cstdint>

namespace jax_flash {

enum class DType : int32_t { kF32, kF16, kBF16 };

inline constexpr int64_t item_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

}  // namespace jax_flash
