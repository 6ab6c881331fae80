// How an operator's ffi_{cpu,cuda}.cc meet XLA: a handler takes its buffers by position, in the
// order in which _ops/<op>.py lists them, and puts itself into its module's table.
//
//   ffi::Error forward(cudaStream_t stream, const CallFrame& call);
//   JAX_FLASH_CUDA_HANDLER(forward, "jax_flash.norm_forward", 13, 7);
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/error.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flash {

namespace ffi = xla::ffi;

// One custom call. An operand or result that is off is an empty buffer of shape (0,).
struct CallFrame {
  std::vector<ffi::AnyBuffer> operands, results;
  ffi::Dictionary attributes;
};

inline bool is_empty(const ffi::AnyBuffer& buffer) {
  return buffer.dimensions().size() == 1 && buffer.dimensions()[0] == 0;
}

inline std::optional<DType> to_dtype(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return DType::kF32;
    case ffi::F16:
      return DType::kF16;
    case ffi::BF16:
      return DType::kBF16;
    default:
      return std::nullopt;
  }
}

template <typename T>
ffi::Error read_attribute(const ffi::Dictionary& attributes, const char* name, T& out) {
  auto value = attributes.get<T>(name);
  if (value.has_error()) return value.error();
  out = value.value();
  return ffi::Error::Success();
}

// What launch.h returns -> what XLA wants.
inline ffi::Error to_error(const char* message) {
  return message == nullptr ? ffi::Error::Success() : ffi::Error::Internal(message);
}

// Checks the number of buffers, so that a handler may index them.
inline ffi::Error collect(const char* target, size_t num_operands, size_t num_results,
                          const ffi::RemainingArgs& operands, ffi::RemainingRets& results,
                          CallFrame& call) {
  if (operands.size() != num_operands) {
    return bad_argument(target, std::to_string(num_operands) + " operands", operands.size());
  }
  if (results.size() != num_results) {
    return bad_argument(target, std::to_string(num_results) + " results", results.size());
  }
  for (size_t i = 0; i < num_operands; ++i) {
    auto buffer = operands.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    call.operands.push_back(*buffer);
  }
  for (size_t i = 0; i < num_results; ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    call.results.push_back(**buffer);
  }
  return ffi::Error::Success();
}

// The table of this module's handlers, filled before main by the registrations below.
inline std::map<std::string, XLA_FFI_Handler*>& handlers() {
  static std::map<std::string, XLA_FFI_Handler*> table;
  return table;
}

struct Registration {
  Registration(const char* target, XLA_FFI_Handler* handler) { handlers()[target] = handler; }
};

}  // namespace jax_flash

// Registers `function(Context, const CallFrame&)` as the custom call `target` with so many operands
// and results. `context` is what XLA hands out beside the buffers (PlatformStream<cudaStream_t>,
// ThreadPool); what follows are handler traits.
#define JAX_FLASH_HANDLER(function, target, num_operands, num_results, context, ...)              \
  XLA_FFI_DEFINE_HANDLER(                                                                         \
      function##_handler,                                                                         \
      ([](auto from_xla, xla::ffi::RemainingArgs operands, xla::ffi::RemainingRets results,       \
          xla::ffi::Dictionary attributes) -> xla::ffi::Error {                                   \
        jax_flash::CallFrame call{{}, {}, attributes};                                            \
        JAX_FLASH_RETURN_IF_ERROR(                                                                \
            jax_flash::collect(target, num_operands, num_results, operands, results, call));      \
        return function(from_xla, call);                                                          \
      }),                                                                                         \
      xla::ffi::Ffi::Bind().Ctx<context>().RemainingArgs().RemainingRets().Attrs(), __VA_ARGS__); \
  const jax_flash::Registration function##_registration(target, function##_handler)
