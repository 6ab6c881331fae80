// wgmma: the asynchronous matrix product of a warpgroup (128 threads, the first a multiple of 128),
// D (64 x kN, f32 registers) (+)= A (64 x 16) B (16 x kN). Section names are those of the PTX ISA
// manual, "Asynchronous Warpgroup Level Matrix Instructions". Only a file compiled for sm_90a may
// include this.
//
// D and a register operand A have the fragments of mma.m16n8k16 (sm80.cuh), warp w holding rows 16
// w to 16 w + 15: d[n][e] of lane l is element (16 w + l / 4 + 8 (e / 2), 8 n + 2 (l % 4) + e % 2).
//
// The one shared-memory convention: slabs of [rows][64] 16-bit elements, 128 bytes a row, each slab
// 1024-byte aligned, the 16-byte chunks of row r permuted by an XOR with r % 8 (TMA's 128-byte
// swizzle, device::SharedTile). An operand is K-major where the summed axis is the contiguous one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/sm80.cuh"

namespace jax_flash::ptx {

// "Matrix descriptor" of an operand in shared memory. `slab_bytes` is the distance between slabs:
// it only matters to an MN-major operand of more than 64 columns. Later blocks of the same operand
// are reached by addition, see kColumns16 and kRows16; a slab on is slab_bytes / 16. NOTE: the high
// word is constant and kept out of the additions: a descriptor lives in uniform registers, and each
// instruction there takes the place of one of the softmax.
template <uint32_t kGroupBytes, bool kIsSwizzled>
class SlabDescriptor {
 public:
  __device__ __forceinline__ SlabDescriptor(const void* slab, uint32_t slab_bytes)
      : low_((shared_address(slab) & 0x3ffff) >> 4 | slab_bytes >> 4 << 16) {}
  __device__ __forceinline__ SlabDescriptor operator+(uint32_t offset) const {
    return SlabDescriptor(low_ + offset);
  }
  __device__ __forceinline__ uint64_t bits() const {
    constexpr uint32_t kSwizzle128 = kIsSwizzled ? 1u << 30 : 0;
    return uint64_t{kSwizzle128 | kGroupBytes >> 4} << 32 | low_;
  }

 private:
  __device__ __forceinline__ explicit SlabDescriptor(uint32_t low) : low_(low) {}

  uint32_t low_;
};
using MatrixDescriptor = SlabDescriptor<1024, true>;
// Of an MN-major operand that has the same eight rows twice: a slab of them, or, with a slab_bytes
// of 0, eight columns of them again and again.
using RepeatedRows = SlabDescriptor<0, true>;
using RepeatedBlock = SlabDescriptor<0, false>;
inline constexpr uint32_t kColumns16 = 16 * 2 >> 4;  // 16 columns on, inside a slab
inline constexpr uint32_t kRows16 = 16 * 128 >> 4;   // 16 rows on

// "wgmma.fence": registers and shared memory that this thread wrote may be read by the next wgmma.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// "wgmma.commit_group", "wgmma.wait_group": waits until at most kPending of the latest groups run.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to an accumulator or a register operand of a running
// wgmma across this point: before the first wgmma that uses it, and after the wait.
template <int kN>
__device__ __forceinline__ void wgmma_pin(float (&d)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
  }
}
template <int kN>
__device__ __forceinline__ void wgmma_pin(uint32_t (&a)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
  }
}

// The operand lists: registers %0 to %(n - 1) are the accumulator, the rest follows.
#define JAX_FLASH_REGISTERS_32                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define JAX_FLASH_REGISTERS_40 \
  JAX_FLASH_REGISTERS_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define JAX_FLASH_REGISTERS_48 \
  JAX_FLASH_REGISTERS_40       \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define JAX_FLASH_REGISTERS_64 \
  JAX_FLASH_REGISTERS_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_FLASH_REGISTERS_96                                                       \
  JAX_FLASH_REGISTERS_64                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define JAX_FLASH_REGISTERS_128                                                                  \
  JAX_FLASH_REGISTERS_96                                                                         \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
#define JAX_FLASH_D8(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define JAX_FLASH_D32(d, n) \
  JAX_FLASH_D8(d, n), JAX_FLASH_D8(d, n + 1), JAX_FLASH_D8(d, n + 2), JAX_FLASH_D8(d, n + 3)
#define JAX_FLASH_D64(d) JAX_FLASH_D32(d, 0), JAX_FLASH_D32(d, 4)
#define JAX_FLASH_D80(d) JAX_FLASH_D64(d), JAX_FLASH_D8(d, 8), JAX_FLASH_D8(d, 9)
#define JAX_FLASH_D96(d) JAX_FLASH_D64(d), JAX_FLASH_D32(d, 8)
#define JAX_FLASH_D128(d) JAX_FLASH_D96(d), JAX_FLASH_D32(d, 12)
#define JAX_FLASH_D192(d) JAX_FLASH_D128(d), JAX_FLASH_D32(d, 16), JAX_FLASH_D32(d, 20)
#define JAX_FLASH_D256(d) JAX_FLASH_D192(d), JAX_FLASH_D32(d, 24), JAX_FLASH_D32(d, 28)

// One wgmma with A from shared memory (SS) and one with A from registers (RS). `n` columns, `r` = n
// / 2 accumulator registers; the numbers are those of the operands that follow them.
#define JAX_FLASH_WGMMA_SS(type, n, r, a_, b_, add_, ta_, tb_)                                     \
  asm volatile(                                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #add_                                                   \
      ", 0;\n"                                                                                     \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" JAX_FLASH_REGISTERS_##r \
      "}, %" #a_ ", %" #b_ ", p, 1, 1, %" #ta_ ", %" #tb_ ";\n}"                                   \
      : JAX_FLASH_D##n(d)                                                                          \
      : "l"(a.bits()), "l"(b.bits()), "r"(int{accumulate}), "n"(kTransposeA), "n"(kTransposeB))
#define JAX_FLASH_WGMMA_RS(type, n, r, a0_, a1_, a2_, a3_, b_, add_, tb_)                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add_                                         \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                    \
               " {" JAX_FLASH_REGISTERS_##r "}, {%" #a0_ ", %" #a1_ ", %" #a2_ ", %" #a3_         \
                                            "}, %" #b_ ", p, 1, 1, %" #tb_ ";\n}"                 \
               : JAX_FLASH_D##n(d)                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(int{accumulate}), \
                 "n"(kTransposeB))

// "wgmma.mma_async": D (+)= A B, both in shared memory. kTransposeA, kTransposeB: that operand is
// MN-major. Without `accumulate` D is overwritten.
template <typename Element, bool kTransposeA, bool kTransposeB, int kFragments, class A, class B>
__device__ __forceinline__ void wgmma(float (&d)[kFragments][4], A a, B b, bool accumulate) {
  constexpr int kN = 8 * kFragments;
  constexpr bool kIsBf16 = std::is_same_v<Element, __nv_bfloat16>;
  static_assert(kN == 64 || kN == 80 || kN == 96 || kN == 128 || kN == 192 || kN == 256);
  if constexpr (kN == 64 && kIsBf16) {
    JAX_FLASH_WGMMA_SS("bf16", 64, 32, 32, 33, 34, 35, 36);
  } else if constexpr (kN == 64) {
    JAX_FLASH_WGMMA_SS("f16", 64, 32, 32, 33, 34, 35, 36);
  } else if constexpr (kN == 80 && kIsBf16) {
    JAX_FLASH_WGMMA_SS("bf16", 80, 40, 40, 41, 42, 43, 44);
  } else if constexpr (kN == 80) {
    JAX_FLASH_WGMMA_SS("f16", 80, 40, 40, 41, 42, 43, 44);
  } else if constexpr (kN == 96 && kIsBf16) {
    JAX_FLASH_WGMMA_SS("bf16", 96, 48, 48, 49, 50, 51, 52);
  } else if constexpr (kN == 96) {
    JAX_FLASH_WGMMA_SS("f16", 96, 48, 48, 49, 50, 51, 52);
  } else if constexpr (kN == 128 && kIsBf16) {
    JAX_FLASH_WGMMA_SS("bf16", 128, 64, 64, 65, 66, 67, 68);
  } else if constexpr (kN == 128) {
    JAX_FLASH_WGMMA_SS("f16", 128, 64, 64, 65, 66, 67, 68);
  } else if constexpr (kN == 192 && kIsBf16) {
    JAX_FLASH_WGMMA_SS("bf16", 192, 96, 96, 97, 98, 99, 100);
  } else if constexpr (kN == 192) {
    JAX_FLASH_WGMMA_SS("f16", 192, 96, 96, 97, 98, 99, 100);
  } else if constexpr (kN == 256 && kIsBf16) {
    JAX_FLASH_WGMMA_SS("bf16", 256, 128, 128, 129, 130, 131, 132);
  } else if constexpr (kN == 256) {
    JAX_FLASH_WGMMA_SS("f16", 256, 128, 128, 129, 130, 131, 132);
  }
}

// The same with A in registers; they must not change until the wait.
template <typename Element, bool kTransposeB, int kFragments>
__device__ __forceinline__ void wgmma(float (&d)[kFragments][4], const uint32_t (&a)[4],
                                      MatrixDescriptor b, bool accumulate) {
  constexpr int kN = 8 * kFragments;
  constexpr bool kIsBf16 = std::is_same_v<Element, __nv_bfloat16>;
  static_assert(kN == 64 || kN == 80 || kN == 96 || kN == 128 || kN == 192 || kN == 256);
  if constexpr (kN == 64 && kIsBf16) {
    JAX_FLASH_WGMMA_RS("bf16", 64, 32, 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (kN == 64) {
    JAX_FLASH_WGMMA_RS("f16", 64, 32, 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (kN == 80 && kIsBf16) {
    JAX_FLASH_WGMMA_RS("bf16", 80, 40, 40, 41, 42, 43, 44, 45, 46);
  } else if constexpr (kN == 80) {
    JAX_FLASH_WGMMA_RS("f16", 80, 40, 40, 41, 42, 43, 44, 45, 46);
  } else if constexpr (kN == 96 && kIsBf16) {
    JAX_FLASH_WGMMA_RS("bf16", 96, 48, 48, 49, 50, 51, 52, 53, 54);
  } else if constexpr (kN == 96) {
    JAX_FLASH_WGMMA_RS("f16", 96, 48, 48, 49, 50, 51, 52, 53, 54);
  } else if constexpr (kN == 128 && kIsBf16) {
    JAX_FLASH_WGMMA_RS("bf16", 128, 64, 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (kN == 128) {
    JAX_FLASH_WGMMA_RS("f16", 128, 64, 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (kN == 192 && kIsBf16) {
    JAX_FLASH_WGMMA_RS("bf16", 192, 96, 96, 97, 98, 99, 100, 101, 102);
  } else if constexpr (kN == 192) {
    JAX_FLASH_WGMMA_RS("f16", 192, 96, 96, 97, 98, 99, 100, 101, 102);
  } else if constexpr (kN == 256 && kIsBf16) {
    JAX_FLASH_WGMMA_RS("bf16", 256, 128, 128, 129, 130, 131, 132, 133, 134);
  } else if constexpr (kN == 256) {
    JAX_FLASH_WGMMA_RS("f16", 256, 128, 128, 129, 130, 131, 132, 133, 134);
  }
}

#undef JAX_FLASH_REGISTERS_32
#undef JAX_FLASH_REGISTERS_40
#undef JAX_FLASH_REGISTERS_48
#undef JAX_FLASH_REGISTERS_64
#undef JAX_FLASH_REGISTERS_96
#undef JAX_FLASH_REGISTERS_128
#undef JAX_FLASH_D8
#undef JAX_FLASH_D32
#undef JAX_FLASH_D64
#undef JAX_FLASH_D80
#undef JAX_FLASH_D96
#undef JAX_FLASH_D128
#undef JAX_FLASH_D192
#undef JAX_FLASH_D256
#undef JAX_FLASH_WGMMA_SS
#undef JAX_FLASH_WGMMA_RS

}  // namespace jax_flash::ptx
