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

// Elements at `source`, `count` of them (8 where aligned), and zeros.
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
    if (count == 0) return;
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

// The rows of units in shared memory: `stages` units of a team, each with its rows of every operand.
template <typename X, int kVectors>
class Stages {
 public:
  __device__ Stages(const Team& team, const Plan& plan, int64_t width, int64_t entry, char* memory)
      : team_(team),
        plan_(plan),
        width_(width),
        entry_(entry),
        memory_(memory + team.index * plan.stages * plan.stage_bytes) {}

  // Starts to copy the unit's rows; named(rows, row) says which one it is in an operand's own count,
  // -1: zeros. One group of copies, also where there is no unit.
  template <int kRows, typename Named>
  __device__ __forceinline__ void fill(int stage, bool exists, const Unit& unit, Named&& named) {
    if (exists) {
#pragma unroll 1
      for (int i = 0; i < kMaxOperands; ++i) {
        const Operand& operand = plan_.operands[i];
        if (operand.data == nullptr) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (unit.row[r] < 0) continue;
          const int row = named(operand.rows, unit.row[r]);
          if (plan_.is_aligned) {
            copy(operand, start(operand, stage, r), row);
          } else {
            copy_elements(operand, start(operand, stage, r), row);
          }
        }
      }
    }
    ptx::cp_async_commit();
  }

  // Until the oldest stage is there (all of them, for a unit that was not copied ahead).
  __device__ __forceinline__ void wait(bool for_all) const {
    if (for_all || plan_.stages == 1) {
      ptx::cp_async_wait<0>();
    } else if (plan_.stages == 2) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<2>();
    }
    __syncwarp();  // the other lanes' copies
  }

  // This thread's columns of vector v of the unit's row r.
  __device__ __forceinline__ void read(float (&x)[kCols], int index, int stage, int r,
                                       int v) const {
    const Operand& operand = plan_.operands[index];
    const char* part = start(operand, stage, r) + warp_start(operand, v);
    if (sizeof(X) == 4 || operand.item_bytes == 4) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        widen<float>(x + 4 * k,
                     *reinterpret_cast<const uint4*>(part + swizzled(2 * team_.lane + k) * 16));
      }
    } else {
      widen<X>(x, *reinterpret_cast<const uint4*>(part + swizzled(team_.lane) * 16));
    }
  }

 private:
  __device__ __forceinline__ char* start(const Operand& operand, int stage, int r) const {
    return memory_ + stage * plan_.stage_bytes + operand.offset + r * operand.row_bytes;
  }
  // Where the warp's columns of vector v begin, in bytes.
  __device__ __forceinline__ int warp_start(const Operand& operand, int v) const {
    return (v * team_.warps + team_.warp) * 32 * kCols * operand.item_bytes;
  }
  __device__ __forceinline__ const char* source_of(const Operand& operand, int row) const {
    return operand.data + entry_ * operand.entry_bytes + row * (width_ * operand.item_bytes);
  }

  __device__ __forceinline__ void copy(const Operand& operand, char* target, int row) const {
    const uint32_t place = ptx::shared_address(target);
    const char* source = source_of(operand, row);
    const int bytes = static_cast<int>(width_) * operand.item_bytes;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (k * 2 >= operand.item_bytes) break;
        const int first = warp_start(operand, v), chunk = k * 32 + team_.lane;
        const bool exists = row >= 0 && first + chunk * 16 < bytes;
        ptx::cp_async_16(place + first + swizzled(chunk) * 16, source + first + chunk * 16,
                         exists ? 16 : 0);
      }
    }
  }

  // The same for rows that do not start at multiples of 16 bytes: each lane its own columns.
  __device__ __forceinline__ void copy_elements(const Operand& operand, char* target,
                                                int row) const {
    const char* source = source_of(operand, row);
#pragma unroll 1
    for (int v = 0; v < kVectors; ++v) {
      const int column = team_.column(v), count = row < 0 ? 0 : columns_left(width_, column);
      float x[kCols];
      uint4* part = reinterpret_cast<uint4*>(target + warp_start(operand, v));
      if (sizeof(X) == 4 || operand.item_bytes == 4) {
        load(x, reinterpret_cast<const float*>(source) + column, count, false);
        part[swizzled(2 * team_.lane)] = narrow<float>(x);
        part[swizzled(2 * team_.lane + 1)] = narrow<float>(x + 4);
      } else {
        load(x, reinterpret_cast<const X*>(source) + column, count, false);
        part[swizzled(team_.lane)] = narrow<X>(x);
      }
    }
  }

  const Team& team_;
  const Plan& plan_;
  int64_t width_, entry_;
  char* memory_;
};

}  // namespace jax_flash::norm
