// The forward kernel on Hopper (sm_90a), for bf16 and fp16:
//   S = Q K^T,   P = 2^(scale_log2 S - m),   O = dropout(P) V / sum P,   lse = log sum exp
// One persistent CTA an SM. Of the first warpgroup one warp finds jobs (a tile of queries of one
// head) and one copies their Q, K and V by TMA (forward_producer.cuh); each of the others owns 64
// rows of the tile (forward_consumer.cuh). The keys of job after job are one stream of steps, so
// that the first S of a job is multiplied under the last P V of the one before. The schedule, with
// pictures: docs/kernels/hopper_forward.md.
#pragma once

#include "attention/cuda/sm90/forward_consumer.cuh"
#include "attention/cuda/sm90/forward_producer.cuh"

namespace jax_flash::attention::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments a) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto* teams = reinterpret_cast<typename Traits::Smem*>(smem_bytes);
  constexpr int kWarps = 4 * Traits::kConsumers;  // that release what they have used,
  constexpr int kLanes = kWarps * kWarpLanes;     // or all of their lanes
  if (threadIdx.x < Traits::kTeams) {
    auto& smem = teams[threadIdx.x];
    for (int i = 0; i < Traits::kJobs; ++i) {
      ptx::mbarrier_init(smem.job_full[i], 1);
      ptx::mbarrier_init(smem.job_empty[i], kLanes + kWarpLanes);  // and the loader's
    }
    for (int i = 0; i < Traits::kQueryStages; ++i) {
      ptx::mbarrier_init(smem.q_full[i], 1);
      ptx::mbarrier_init(smem.q_empty[i], kWarps);
    }
    for (int i = 0; i < Traits::kKeyStages; ++i) {
      ptx::mbarrier_init(smem.k_full[i], 1);
      ptx::mbarrier_init(smem.k_empty[i], kLanes);
    }
    for (int i = 0; i < Traits::kValueStages; ++i) {
      ptx::mbarrier_init(smem.v_full[i], 1);
      ptx::mbarrier_init(smem.v_empty[i], kWarps);
    }
    ptx::mbarrier_init(smem.ragged, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();  // the barriers are there
  // The next launch may begin where this one is done. NOTE: it finds its first jobs, but the
  // scheduler and the loader touch no array until this grid has ended and its writes can be seen;
  // the consumers work on what the loader then brings.
  ptx::launch_dependents();

  // NOTE: the compiler must know that the role is the same for a whole warp.
  const int warp = __shfl_sync(device::kWarp, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::give_registers<Traits::kProducerRegisters>();
    const int team = Traits::kTeams == 1 ? 0 : warp / 2;
    if (warp - 2 * team == 0) ForwardLoader<Traits>(teams[team], a).run();
    if (warp - 2 * team == 1) schedule_jobs<Traits>(teams[team], a, team);
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    const int consumer = warp / 4 - 1;
    const int team = Traits::kTeams == 1 ? 0 : consumer / Traits::kConsumers;
    ForwardConsumer<Traits>(teams[team], a, consumer - team * Traits::kConsumers).run();
  }
}

}  // namespace jax_flash::attention::sm90
