// Moving rows: 8 columns of a thread from and to global memory, and rows copied ahead into shared
// memory with cp.async.
//
// A stage holds each operand's rows as they lie in memory, in chunks of 16 bytes; each warp copies
// the 256 columns that its own lanes hold, so that no barrier but the warp's is needed.
#pragma once

#include "device/element.cuh"
#include "device/vector.cuh"
#include "norm/cuda/team.cuh"

namespace jax_flash::norm {

// 16 bytes of elements <-> floats.
template <typename Element>
__device__ __forceinline__ void widen(float* x, const uint4& chunk) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
      // NOTE: of __bfloat1622float2 sm_90 code takes two instructions for the upper half.
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 pair = device::unpack<Element>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}
template <typename Element>
__device__ __forceinline__ uint4 narrow(const float* x) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = device::pack<Element>(x[2 * i], x[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Elements at `source`, `count` of them (none or 8 where aligned), and zeros.
template <typename Element>
__device__ __forceinline__ void load(float (&x)[kCols], const Element* source, int count,
                                     bool is_aligned) {
  if (is_aligned) {
#pragma unroll
    for (int i = 0; i < kCols; i += 16 / sizeof(Element)) {
      uint4 chunk{0, 0, 0, 0};
      if (count > 0) chunk = *reinterpret_cast<const uint4*>(source + i);
      widen<Element>(x + i, chunk);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCols; ++i) x[i] = i < count ? device::to_float(source[i]) : 0.0f;
  }
}
template <typename Element>
__device__ __forceinline__ void store(const float (&x)[kCols], Element* target, int count,
                                      bool is_aligned) {
  if (is_aligned) {
    if (count <= 0) return;
#pragma unroll
    for (int i = 0; i < kCols; i += 16 / sizeof(Element)) {
      *reinterpret_cast<uint4*>(target + i) = narrow<Element>(x + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
      if (i < count) target[i] = device::from_float<Element>(x[i]);
    }
  }
}

// An array of elements that are X, or float32 beside a 16-bit X.
template <typename X>
__device__ __forceinline__ void load(float (&x)[kCols], const void* base, bool is_wide,
                                     int64_t index, int count, bool is_aligned) {
  if (sizeof(X) == 2 && is_wide) {
    load(x, static_cast<const float*>(base) + index, count, is_aligned);
  } else {
    load(x, static_cast<const X*>(base) + index, count, is_aligned);
  }
}
template <typename X>
__device__ __forceinline__ void store(const float (&x)[kCols], void* base, bool is_wide,
                                      int64_t index, int count, bool is_aligned) {
  if (sizeof(X) == 2 && is_wide) {
    store(x, static_cast<float*>(base) + index, count, is_aligned);
  } else {
    store(x, static_cast<X*>(base) + index, count, is_aligned);
  }
}

inline constexpr int kChunkBytes = 32 * 16;  // of a warp: 16 of each lane

// 8 elements as they lie in memory.
// NOTE: neither loads nor stores say that nobody needs this again soon: with `.cs` the traffic of
// the forward alone takes 142 us for 135, that of the backward 138 for 124 (4096 features, H200,
// 2026-11-28). Loads that the L2 is to keep (`evict_last`) take 5 us less in the forward, but stay
// there: 20 copies of 16 MiB after it took 171 us for 139.
template <typename Element>
struct Raw {
  static constexpr int kChunks = kCols * sizeof(Element) / 16;
  uint4 chunk[kChunks] = {};

  __device__ __forceinline__ static Raw load(const Element* source) {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) raw.chunk[k] = reinterpret_cast<const uint4*>(source)[k];
    return raw;
  }
  // What all rows need.
  __device__ __forceinline__ static Raw load_cached(const Element* source) {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      raw.chunk[k] = __ldg(reinterpret_cast<const uint4*>(source) + k);
    }
    return raw;
  }
  // By way of shared memory: a thread's own 16 bytes of each chunk of the warp. What does not exist
  // is zeros.
  __device__ __forceinline__ static void start_copy(uint32_t target, const Element* source,
                                                    bool exists) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      ptx::cp_async_16(target + k * kChunkBytes, reinterpret_cast<const uint4*>(source) + k,
                       exists ? 16 : 0);
    }
  }
  __device__ __forceinline__ static Raw copied(uint32_t place) {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      raw.chunk[k] = ptx::load_shared_16(place + k * kChunkBytes);
    }
    return raw;
  }
  __device__ __forceinline__ void store(Element* target) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) reinterpret_cast<uint4*>(target)[k] = chunk[k];
  }
  __device__ __forceinline__ void widen(float (&x)[kCols]) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) norm::widen<Element>(x + k * kCols / kChunks, chunk[k]);
  }
  __device__ __forceinline__ static Raw narrow(const float (&x)[kCols]) {
    Raw raw;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) raw.chunk[k] = norm::narrow<Element>(x + k * kCols / kChunks);
    return raw;
  }
};

// Whether each of 8 columns is kept, as bytes.
__device__ __forceinline__ void store_mask(uint32_t kept, uint8_t* target, int count,
                                           bool is_aligned) {
  if (is_aligned) {
    // A nibble times 1 + 2^7 + 2^14 + 2^21 has its bits at the lowest of each byte.
    const uint2 bytes{(kept & 15u) * 0x204081u & 0x01010101u,
                      (kept >> 4 & 15u) * 0x204081u & 0x01010101u};
    if (count > 0) *reinterpret_cast<uint2*>(target) = bytes;
  } else {
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
      if (i < count) target[i] = kept >> i & 1;
    }
  }
}

// Where the 16-byte chunk of a warp's part of a row lies: float32 lanes read every second chunk,
// and eight of them shall meet all 32 banks.
__device__ __forceinline__ int swizzled(int chunk) { return chunk ^ (chunk >> 3 & 1); }

// The rows of units in shared memory: [stage][warp][operand][row][vector][256 columns of the warp].
template <typename X, int kRows, int kVectors, int kOperands>
class Stages {
 public:
  __device__ Stages(const Team& team, const Plan& plan, int64_t width, int64_t entry, char* memory)
      : team_(team),
        plan_(plan),
        width_(static_cast<int>(width)),
        entry_(entry),
        warp_(ptx::shared_address(memory) + team.index * plan.stages * plan.stage_bytes +
              team.warp * plan.warp_bytes) {}

  // Starts to copy the unit's rows; named(rows, row) says which one it is in an operand's own
  // count, -1: zeros. One group of copies, also where there is no unit.
  template <typename Named>
  __device__ __forceinline__ void fill(int stage, bool exists, const Unit& unit, Named&& named) {
    if (exists) {
#pragma unroll 1
      for (int i = 0; i < kOperands; ++i) copy_rows(i, stage, unit, named);
    }
    ptx::cp_async_commit();
  }

  // Until the oldest stage is there (all of them, for a unit that was not copied ahead).
  __device__ __forceinline__ void wait(bool for_all) const {
    wait_for_oldest(for_all ? 1 : plan_.stages);
    __syncwarp();  // the other lanes' copies
  }

  // This thread's columns of vector v of the unit's row r.
  __device__ __forceinline__ void read(float (&x)[kCols], int index, int stage, int r,
                                       int v) const {
    if (sizeof(X) == 4 || plan_.operands[index].item_bytes == 4) {
      const uint32_t part = place(index, stage, r, v, 4);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        widen<float>(x + 4 * k, ptx::load_shared_16(part + swizzled(2 * team_.lane + k) * 16));
      }
    } else {
      const uint32_t part = place(index, stage, r, v, 2);
      widen<X>(x, ptx::load_shared_16(part + swizzled(team_.lane) * 16));
    }
  }

 private:
  __device__ __forceinline__ uint32_t place(int index, int stage, int r, int v,
                                            int item_bytes) const {
    return warp_ + stage * plan_.stage_bytes + plan_.operands[index].offset +
           (r * kVectors + v) * 32 * kCols * item_bytes;
  }

  template <typename Named>
  __device__ __forceinline__ void copy_rows(int index, int stage, const Unit& unit, Named&& named) {
    const Operand& operand = plan_.operands[index];
    if (operand.data == nullptr) return;
    const int item_bytes = sizeof(X) == 4 || operand.item_bytes == 4 ? 4 : 2;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (unit.row[r] < 0) continue;
      const int row = named(operand.rows, unit.row[r]);
      const char* source =
          operand.data + entry_ * operand.entry_bytes + row * (int64_t{width_} * item_bytes);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t target = place(index, stage, r, v, item_bytes);
        if (plan_.is_aligned) {
          copy(target, source, v, item_bytes, row >= 0);
        } else {
          copy_elements(target, source, v, item_bytes, row >= 0);
        }
      }
    }
  }

  __device__ __forceinline__ void copy(uint32_t target, const char* source, int v, int item_bytes,
                                       bool exists) const {
    const int first = (v * team_.warps + team_.warp) * 32 * kCols * item_bytes;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (k * 2 >= item_bytes) break;
      const int chunk = k * 32 + team_.lane, byte = first + chunk * 16;
      ptx::cp_async_16(target + swizzled(chunk) * 16, source + byte,
                       exists && byte < width_ * item_bytes ? 16 : 0);
    }
  }

  // The same for rows that do not start at multiples of 16 bytes: each lane its own columns.
  __device__ __forceinline__ void copy_elements(uint32_t target, const char* source, int v,
                                                int item_bytes, bool exists) const {
    const int column = team_.column(v), count = exists ? columns_left(width_, column) : 0;
    float x[kCols];
    if (item_bytes == 4) {
      load(x, reinterpret_cast<const float*>(source) + column, count, false);
      ptx::store_shared_16(target + swizzled(2 * team_.lane) * 16, narrow<float>(x));
      ptx::store_shared_16(target + swizzled(2 * team_.lane + 1) * 16, narrow<float>(x + 4));
    } else {
      load(x, reinterpret_cast<const X*>(source) + column, count, false);
      ptx::store_shared_16(target + swizzled(team_.lane) * 16, narrow<X>(x));
    }
  }

  const Team& team_;
  const Plan& plan_;
  int width_;
  int64_t entry_;
  uint32_t warp_;
};

}  // namespace jax_flash::norm
