// The Hopper instructions beside wgmma (wgmma.cuh): mbarriers, the tensor copy engine (TMA), bulk
// reductions, register reallocation, named barriers and fences; one function an instruction.
// Section names are those of the PTX ISA manual. Shared-memory addresses are 32-bit
// (shared_address). Only a file compiled for sm_90a may include this.
#pragma once

#include <cuda.h>

#include "ptx/sm80.cuh"

namespace jax_flash::ptx {

// An mbarrier in shared memory. A phase completes when its arrivals and its bytes have all come;
// `parity` is that of the phase to wait for, 0 first. Waiting for parity 1 of a fresh barrier
// returns at once: that is how the producer finds the stages empty at the start.
using Mbarrier = uint64_t;

// "mbarrier.init". One thread; fence_barrier_init and a CTA barrier must follow.
__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
// "fence.mbarrier_init": the initialised barriers are visible to the asynchronous proxy.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// "mbarrier.arrive": one arrival; what this thread wrote before is visible after the wait.
__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
// The same, after a load from shared memory that brings `loaded` has ended. NOTE: by itself ptxas
// lets an arrival go behind loads that are on their way, and nothing else makes a dependency that
// it keeps.
__device__ __forceinline__ void mbarrier_arrive_after(Mbarrier& barrier, uint32_t loaded) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.eq.u32 p, %1, 0xffffffff;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "@!p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(loaded)
      : "memory");
}
// "mbarrier.arrive.expect_tx": one arrival, and `bytes` more for the phase to wait for.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
// "mbarrier.try_wait": blocks for a time that the hardware chooses; true if the phase is over.
__device__ __forceinline__ bool mbarrier_try_wait(Mbarrier& barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// "prefetch.tensormap": brings a tensor map (a __grid_constant__ parameter) near the copy engine.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What L2 should think of the lines that a copy reads ("createpolicy", the encodings that
// createpolicy.fractional returns for a fraction of 1).
enum class L2Hint : uint64_t {
  kEvictNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

// "cp.async.bulk.tensor", 4 dimensions, global -> shared: the box of `map` at the coordinates, the
// innermost first. Elements outside the tensor become zero; the bytes of the whole box count on
// `barrier`. One thread.
__device__ __forceinline__ void tma_load(void* destination, const CUtensorMap& map,
                                         Mbarrier& barrier, int c0, int c1, int c2, int c3,
                                         L2Hint hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// "cp.async.bulk.tensor", 4 dimensions, shared -> global: the box of `map` at the coordinates, what
// lies outside the tensor left out. Belongs to this thread's bulk group.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, const void* source, int c0,
                                          int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// "cp.async.bulk", global -> shared: `bytes` (a multiple of 16) from an address that is a multiple
// of 16. One thread.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes,
                                          Mbarrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(destination)),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
}

// "cp.async.bulk", shared -> global: `bytes` (a multiple of 16). Belongs to this thread's bulk
// group.
__device__ __forceinline__ void bulk_store(void* destination, const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(destination)),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
}

// "cp.reduce.async.bulk": adds `bytes` (a multiple of 16) of f32 in shared memory to global memory,
// in no order. Belongs to this thread's bulk group.
__device__ __forceinline__ void bulk_reduce_add(float* destination, const float* source,
                                                uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(destination)),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
}
// "cp.async.bulk.commit_group", "cp.async.bulk.wait_group[.read]": as for cp.async; kRead waits
// only until the sources in shared memory have been read and may be overwritten.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kPending, bool kRead>
__device__ __forceinline__ void bulk_wait() {
  if constexpr (kRead) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
  } else {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
  }
}

// "fence.proxy.async": this thread's ordinary stores to shared memory are visible to wgmma and the
// copy engine, once a barrier has told them.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory: what others wrote there and this thread has seen comes before the
// copies that it starts.
__device__ __forceinline__ void fence_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// "atom.cas", of the whole GPU, as ld.acquire: what was found there, which `value` has replaced
// where it was `expected`.
__device__ __forceinline__ int compare_and_swap_acquire(int* address, int expected, int value) {
  int found;
  asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(found)
               : "l"(__cvta_generic_to_global(address)), "r"(expected), "r"(value)
               : "memory");
  return found;
}
// "ld.acquire", of the whole GPU: what was written before the value that it finds is visible.
__device__ __forceinline__ int load_acquire(const int* address) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
               : "=r"(x)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return x;
}

// "setmaxnreg": a warpgroup takes (gives back) registers, to have kRegisters a thread.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// "elect.sync": true in one lane of a warp, all of whose lanes are here.
__device__ __forceinline__ bool elect_one() {
  uint32_t is_elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(is_elected));
  return is_elected != 0;
}

// "bar.arrive": counts at a barrier that others wait at (named_barrier_sync).
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// "red", .v4: adds four f32 to global memory, in no order; 16-byte aligned.
__device__ __forceinline__ void red_add_4(float* destination, const float (&x)[4]) {
  asm volatile(
      "red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(destination)),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
      : "memory");
}

// "ld.relaxed", .v4: four f32 as they are in L2, this thread's own reductions included.
__device__ __forceinline__ void load_relaxed_4(const float* source, float (&x)[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "l"(__cvta_generic_to_global(source))
               : "memory");
}

// "stmatrix": four 8x8 matrices of 16-bit elements, the reverse of ldmatrix_x4 (and of
// ldmatrix_x4_trans).
__device__ __forceinline__ void stmatrix_x4(uint32_t address, const uint32_t (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, const uint32_t (&d)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
      : "memory");
}

// "griddepcontrol": the next kernel of the stream, launched as programmatic dependent, may start;
// and the wait for the kernel before, whose writes are then visible.
__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_prior_grid() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace jax_flash::ptx
