// The sm_80 instructions that the kernels use, one function an instruction, and nothing else: the
// only asm outside sm90.cuh. Section names are those of the PTX ISA manual. Shared-memory addresses
// are 32-bit (shared_address).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_flash::ptx {

// "Data Movement and Conversion: cvta": a generic pointer into shared memory -> its 32-bit address.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// "cp.async" (non-bulk): 16 bytes, global -> shared, past L1. Reads `source_bytes` (0 or 16) and
// fills the rest with zeros; with 0 the source is not touched.
__device__ __forceinline__ void cp_async_16(uint32_t destination, const void* source,
                                            uint32_t source_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(source), "r"(source_bytes)
               : "memory");
}

// "prefetch": the line of 128 bytes that holds the address is brought into L2.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)) : "memory");
}

// "cp.async.commit_group": closes the group of this thread's cp.async issued since the last one.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// "cp.async.wait_group": waits until at most kPending of this thread's latest groups are in flight.
// Other threads' copies become visible only after a barrier that follows.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// "Data Movement and Conversion: ld.shared, st.shared": 16 bytes of shared memory.
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared_16(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// "Parallel synchronization and communication instructions: bar.sync": waits for `threads` threads
// at one of the CTA's sixteen barriers (0 is that of __syncthreads).
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// "Warp-level matrix load instruction: ldmatrix": four 8x8 matrices of 16-bit elements; lanes 8i to
// 8i+7 give the row addresses of matrix i. Register i then holds, in lane l, elements (row l / 4,
// columns 2 (l % 4) and + 1) of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// The same, each 8x8 matrix transposed on the way: lane l holds (rows 2 (l % 4) and + 1, column l /
// 4).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// "Matrix multiply-accumulate: mma.m16n8k16": D += A B with f32 accumulators. In lane l, with g = l
// / 4 and q = l % 4:
//   a[0..3]  A (rows g, g + 8, g, g + 8; columns 2q.., 2q.., 2q + 8.., 2q + 8..)
//   b0, b1   B (rows 2q.., 2q + 8..; column g)
//   d[0..3]  D (row g, columns 2q, 2q + 1; row g + 8, columns 2q, 2q + 1)
template <typename Element>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1);
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                           uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// "Parallel synchronization and communication instructions: red": *destination += x in global
// memory, in no order, nothing comes back.
__device__ __forceinline__ void red_add(float* destination, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(destination)), "f"(x)
               : "memory");
}

// "Floating point instructions: ex2": 2^x, 2 ulp; -inf -> 0, NaN -> NaN.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// "Integer arithmetic instructions: prmt", with a constant selector of four nibbles, lowest byte
// first: bits 0 to 2 choose a byte of a (0 to 3) or b (4 to 7); bit 3 takes its sign, eight times.
// NOTE: __byte_perm has no use for bit 3.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "n"(kSelector));
  return d;
}

}  // namespace jax_flash::ptx
