// Checks whose message names the argument, what was expected and what came; handlers return it as
// ffi::Error.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_flash {

template <typename Expected, typename Got>
xla::ffi::Error bad_argument(const char* name, const Expected& expected, const Got& got) {
  std::ostringstream text;
  text << "jax_flash: " << name << ": expected " << expected << ", got " << got;
  return xla::ffi::Error::InvalidArgument(text.str());
}

inline std::string to_string(xla::ffi::Span<const int64_t> dims) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < dims.size(); ++i) text << (i ? ", " : "") << dims[i];
  text << "]";
  return text.str();
}

#define JAX_FLASH_RETURN_IF_ERROR(expression)                                \
  do {                                                                       \
    if (xla::ffi::Error error = (expression); error.failure()) return error; \
  } while (0)

}  // namespace jax_flash
