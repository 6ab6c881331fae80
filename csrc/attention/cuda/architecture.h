// Which kernels a call may use on the current device. Host code.
#pragma once

#include "device/architecture.h"

namespace jax_flash::attention {

// What a launch function returns where its kernels do not serve the call, and others must.
inline constexpr char kNotCovered[] = "jax_flash: not covered by these kernels";

using device::runs_sm90_kernels;

}  // namespace jax_flash::attention
