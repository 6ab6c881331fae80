// Two CTAs of a cluster that send each other rows through distributed shared memory.
#include <cstdint>

#include "ptx/cluster.cuh"
#include "testing/ptx/launch.h"

namespace jax_flash::testing {
namespace {

constexpr int kThreads = 128;

// The first CTA sends rows by st.async, the second adds the constant, which both were loaded, and
// copies them back.
__global__ void __cluster_dims__(2, 1, 1)
    cluster_kernel(const uint32_t* source, const uint32_t* constant, int rows, uint32_t* out) {
  __shared__ uint4 inbox[kThreads], outbox[kThreads], back[kThreads], added;
  __shared__ ptx::Mbarrier added_full, inbox_full, inbox_empty, back_full, back_empty;
  const int thread = threadIdx.x;
  const uint32_t rank = ptx::cluster_rank();
  if (thread == 0) {
    ptx::mbarrier_init(added_full, 1);
    ptx::mbarrier_init(inbox_full, 1);
    ptx::mbarrier_init(inbox_empty, kThreads / 32);
    ptx::mbarrier_init(back_full, 1);
    ptx::mbarrier_init(back_empty, 1);
    ptx::mbarrier_arrive_expect(added_full, sizeof(added));
    ptx::mbarrier_arrive_expect(inbox_full, sizeof(inbox));
    ptx::mbarrier_arrive_expect(back_full, sizeof(back));
    ptx::fence_barrier_init();
  }
  ptx::cluster_sync();  // The barriers exist, in both CTAs.
  if (rank == 0 && thread == 0) {
    ptx::bulk_load_to_all(&added, constant, sizeof(added), added_full, 3);
  }
  ptx::mbarrier_wait(added_full, 0);
  const int64_t first = int64_t{blockIdx.x / 2} * rows * kThreads + thread;
  for (int i = 0; i < rows; ++i) {
    if (rank == 0) {
      const uint4 x = reinterpret_cast<const uint4*>(source)[first + int64_t{i} * kThreads];
      const uint32_t words[4] = {x.x - added.x, x.y, x.z, x.w};
      ptx::mbarrier_wait(inbox_empty, i & 1 ^ 1);
      ptx::store_async(ptx::peer_address(&inbox[thread], 1), words,
                       ptx::peer_address(&inbox_full, 1));
      ptx::mbarrier_wait(back_full, i & 1);
      reinterpret_cast<uint4*>(out)[first + int64_t{i} * kThreads] = back[thread];
      __syncthreads();  // All have read the row: the next may come.
      if (thread == 0) {
        ptx::mbarrier_arrive_expect(back_full, sizeof(back));
        ptx::mbarrier_arrive_at(back_empty, 1);
      }
    } else {
      ptx::mbarrier_wait(inbox_full, i & 1);
      const uint4 x = inbox[thread];
      if (thread == 0) ptx::mbarrier_arrive_expect(inbox_full, sizeof(inbox));
      if (thread % 32 == 0) ptx::mbarrier_arrive_at_after(inbox_empty, 0, x.w);
      ptx::mbarrier_wait(back_empty, i & 1 ^ 1);
      outbox[thread] = {x.x + added.x, x.y + added.y, x.z + added.z, x.w + added.w};
      ptx::fence_async_shared();
      __syncthreads();  // The row is written before it is copied.
      if (thread == 0) ptx::bulk_copy_to(back, outbox, sizeof(back), back_full, 0);
    }
  }
  ptx::cluster_sync();  // The other CTA reaches into our shared memory until it is done.
}

}  // namespace

const char* launch_cluster(const uint32_t* source, const uint32_t* constant, int pairs, int rows,
                           uint32_t* out, cudaStream_t stream) {
  cluster_kernel<<<2 * pairs, kThreads, 0, stream>>>(source, constant, rows, out);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_flash::testing
