// The frame of the Hopper backward kernels whose first warpgroup brings the operands and makes dQ
// for the others (backward_supplier.cuh, backward_column.cuh).
#pragma once

#include "attention/cuda/sm90/backward_common.cuh"
#include "attention/cuda/sm90/backward_terms.cuh"
#include "device/warp.cuh"
#include "ptx/sm90.cuh"

namespace jax_flash::attention::sm90 {

// Sets up shared memory, `initialise` its barriers, and parts the warpgroups. All threads.
template <class Traits, typename Initialise, typename Supply, typename Consume>
__device__ __forceinline__ void run_supplied(typename Traits::Smem& smem,
                                             const Initialise& initialise, const Supply& supply,
                                             const Consume& consume) {
  // NOTE: the shuffle tells the compiler that a warp is of one mind.
  const int warpgroup = __shfl_sync(device::kWarp, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) initialise();
  fill_weights<typename Traits::Element>(smem.weights);
  for (auto& terms : smem.terms) zero_other_rows<Traits::kTermRows>(terms);
  ptx::fence_async_shared();
  __syncthreads();  // The barriers exist, the constants are written.
  if (warpgroup == 0) {
    ptx::give_registers<Traits::kSupplierRegisters>();
    supply();
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    consume(warpgroup - 1);
  }
}

}  // namespace jax_flash::attention::sm90
