// The kernels that exist, each compiled in a file of its own under instances/.
#pragma once

#include "norm/cuda/layout.h"

namespace jax_flash::norm {

// The common call (layout.h); Before: Nothing, or on Hopper PriorGrid.
template <typename X, typename Before>
const char* forward_common(const ForwardParams& params, const Layout& layout, cudaStream_t stream);
template <typename X, typename Before>
const char* backward_common(const BackwardParams& params, const Layout& layout,
                            cudaStream_t stream);

// Programmatic dependents of whatever the stream's kernel before them is: what it takes to start a
// kernel passes while that one ends. Defined in instances/sm90.
struct PriorGrid;

// Every call, with two vectors a thread or, in rows wider than 8192, the number below. The
// backward's 256 threads have 255 registers: its two sums of 8 * 8 columns take 128 of them.
inline constexpr int kForwardWideVectors = 4, kBackwardWideVectors = 8;

template <typename X>
const char* forward(const ForwardParams& params, const Plan& plan, cudaStream_t stream);
template <typename X>
const char* backward(const BackwardParams& params, const Plan& plan, cudaStream_t stream);

// The backward's second kernel (sums.cuh) on Hopper: a programmatic dependent of the first.
const char* sum_as_dependent(const BackwardParams& params, int ctas, uint32_t* units_done,
                             cudaStream_t stream);

}  // namespace jax_flash::norm
