// The XLA handlers of attention. _cpu and _cuda each define both symbols, in ffi_cpu.cc and
// ffi_cuda.cc.
#pragma once

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(AttentionForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(AttentionBackward);
