// The kernels that exist, each compiled in a file of its own under instances/.
#pragma once

#include "norm/cuda/plan.h"

namespace jax_flash::norm {

// What the instruction stream feels. The first two forms are the common call: aligned rows, one
// branch, one norm, no scales, no subsets, no mask written; the type of the stream is S. kAny is
// every call, with two vectors a thread or the number for wide rows.
enum class Form { kPlain, kDropout, kAny };

// Vectors a thread in rows wider than 8192. The backward's 256 threads have 255 registers: its two
// sums of 8 * 8 columns take 128 of them.
inline constexpr int kForwardWideVectors = 4, kBackwardWideVectors = 8;
// Threads of a CTA of the plain forward with one vector a thread, which needs 64 registers.
inline constexpr int kPlainForwardThreads = 2 * kMaxThreads;

template <typename X>
const char* forward(const ForwardParams& params, const Plan& plan, cudaStream_t stream);
template <typename X>
const char* backward(const BackwardParams& params, const Plan& plan, cudaStream_t stream);

}  // namespace jax_flash::norm
