// The Hopper instructions for CTAs of a cluster that reach into each other's shared memory; one
// function an instruction. Section names are those of the PTX ISA manual. Addresses that
// `peer_address` returns are of the cluster's window. Only a file compiled for sm_90a may include
// this.
#pragma once

#include "ptx/sm90.cuh"

namespace jax_flash::ptx {

// "%cluster_ctarank": the rank of this CTA in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// "barrier.cluster": all threads of all CTAs of the cluster; what they wrote before is visible.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// "mapa": where the object at this place in our shared memory lies in that of CTA `rank`.
__device__ __forceinline__ uint32_t peer_address(const void* object, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(object)), "r"(rank));
  return address;
}
// "mbarrier.arrive" at the barrier that lies at this place in CTA `rank`.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier& barrier, uint32_t rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer_address(&barrier, rank))
               : "memory");
}
// The same, after a load from shared memory that brings `loaded` has ended (mbarrier_arrive_after).
// "release" at the scope of the cluster is MEMBAR.GPU and waits for all that is on its way to
// global memory.
__device__ __forceinline__ void mbarrier_arrive_at_after(Mbarrier& barrier, uint32_t rank,
                                                         uint32_t loaded) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.eq.u32 p, %1, 0xffffffff;\n"
      "@p mbarrier.arrive.shared::cluster.b64 _, [%0];\n"
      "@!p mbarrier.arrive.shared::cluster.b64 _, [%0];\n"
      "}" ::"r"(peer_address(&barrier, rank)),
      "r"(loaded)
      : "memory");
}
// "st.async": 16 bytes to another CTA's shared memory; they count on a barrier there.
__device__ __forceinline__ void store_async(uint32_t destination, const uint32_t (&x)[4],
                                            uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(destination),
      "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(barrier)
      : "memory");
}
// "cp.async.bulk", shared -> shared of CTA `rank`, to the place that `destination` has here; the
// bytes count on the barrier at the place of `barrier` there. One thread.
__device__ __forceinline__ void bulk_copy_to(void* destination, const void* source, uint32_t bytes,
                                             Mbarrier& barrier, uint32_t rank) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(peer_address(destination, rank)),
      "r"(shared_address(source)), "r"(bytes), "r"(peer_address(&barrier, rank))
      : "memory");
}
// bulk_load into every CTA of `mask`, at the same place in each, where the bytes count on the
// barrier at the same place.
__device__ __forceinline__ void bulk_load_to_all(void* destination, const void* source,
                                                 uint32_t bytes, Mbarrier& barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(destination)),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(shared_address(&barrier)), "h"(mask)
      : "memory");
}

}  // namespace jax_flash::ptx
