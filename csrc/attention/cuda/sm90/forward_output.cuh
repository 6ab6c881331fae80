// The end of a job in the Hopper forward: a warp normalises its 16 rows of O and writes them, with
// lse; by the copy engine where there are registers for it (ForwardTraits::kHasRoom) and the rows
// are all of one sequence, else by its own stores.
#pragma once

#include "attention/cuda/sm90/forward_traits.cuh"
#include "attention/cuda/sm90/softmax.cuh"
#include "device/element.cuh"
#include "device/opaque.cuh"

namespace jax_flash::attention::sm90 {

template <typename Traits>
class ForwardOutput {
 public:
  using Element = typename Traits::Element;
  using Tile = typename Traits::OutputTile;

  // The warp's rows are [first_row, first_row + 16) of the job's sequence; `softmax` is finished.
  __device__ __forceinline__ ForwardOutput(const ForwardArguments& a,
                                           const typename Traits::Job& job, int first_row,
                                           const RowSoftmax<Element>& softmax,
                                           float (&rO)[Traits::kFragmentsV][4])
      : a_(a), job_(job), first_row_(first_row), softmax_(softmax), rO_(rO) {}

  // O through shared memory, so that the copy engine writes it while the warp goes on.
  __device__ __forceinline__ void copy(Tile& tile) {
    using Address = device::LdmatrixAddress<Tile>;
    const int lane = device::opaque_lane(), row = first_row_ + lane / 4;
    const float factor[2] = {factor_of(row < job_.s.query_length, 0),
                             factor_of(row + 8 < job_.s.query_length, 1)};
    if (factor[0] == 0.0f || factor[1] == 0.0f) {  // one branch for what is rare
      clear_unseen(factor[0], 0);
      clear_unseen(factor[1], 1);
    }
    const Address address(tile, Address::Order::kRowsFirst, 0, lane);
    if (lane == 0) ptx::bulk_wait<0, true>();
    __syncwarp();  // the last copy has read the tile
#pragma unroll
    for (int d = 0; d < Traits::kFragmentsV; d += 2) {
      const uint32_t packed[4] = {pack_output(d, 0, factor[0]), pack_output(d, 1, factor[1]),
                                  pack_output(d + 1, 0, factor[0]),
                                  pack_output(d + 1, 1, factor[1])};
      ptx::stmatrix_x4(address(0, 8 * d), packed);
    }
    ptx::fence_async_shared();
    __syncwarp();  // the tile is there
    if (lane == 0) {
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        ptx::tma_store(a_.o.map, reinterpret_cast<char*>(&tile) + slab * Tile::kSlabBytes,
                       64 * slab, job_.s.query_start + first_row_, job_.head, job_.out_batch);
      }
      ptx::bulk_commit();
    }
    // NOTE: not before the fence, which waits for whatever was written.
    // A lane of each quad for each of its rows.
    const int half = lane % 4, lse_row = row + 8 * half;
    if (half < 2 && lse_row < job_.s.query_rows) {
      const float lse = half == 0 ? softmax_.lse(0) : softmax_.lse(1);
      job_.lse[lse_row] = lse_row < job_.s.query_length ? lse : -INFINITY;
    }
  }

  // O through shared memory, from which neighbouring lanes write neighbouring chunks, so that a
  // store of the warp is whole lines.
  __device__ __forceinline__ void write_lines(Tile& tile) {
    using Address = device::LdmatrixAddress<Tile>;
    constexpr int kLanes = Tile::kCols / 8;  // of a row
    constexpr int kRows = 32 / kLanes;       // of a store
    const int lane = device::opaque_lane(), row = first_row_ + lane / 4;
    const float factor[2] = {factor_of(row < job_.s.query_length, 0),
                             factor_of(row + 8 < job_.s.query_length, 1)};
    clear_unseen(factor[0], 0);
    clear_unseen(factor[1], 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (lane % 4 == 0 && row + 8 * half < job_.s.query_rows) {
        job_.lse[row + 8 * half] =
            row + 8 * half < job_.s.query_length ? softmax_.lse(half) : -INFINITY;
      }
    }
    const Address address(tile, Address::Order::kRowsFirst, 0, lane);
    const int store_row = lane / kLanes, chunk = lane % kLanes * 8;
    const int rows_left = job_.s.query_rows - first_row_ - store_row;
    Element* gO = job_.o + (first_row_ + store_row) * a_.p.o.row_stride + chunk;
    const int64_t step = kRows * a_.p.o.row_stride;
#pragma unroll
    for (int col = 0; col < Traits::kValueDim; col += Tile::kCols) {
      __syncwarp();  // the columns before have been read
#pragma unroll
      for (int d = 0; d < Tile::kCols / 8; d += 2) {
        const int f = col / 8 + d;
        const uint32_t packed[4] = {pack_output(f, 0, factor[0]), pack_output(f, 1, factor[1]),
                                    pack_output(f + 1, 0, factor[0]),
                                    pack_output(f + 1, 1, factor[1])};
        ptx::stmatrix_x4(address(0, 8 * d), packed);
      }
      __syncwarp();  // the tile is there
      const bool is_written = col + chunk < static_cast<int>(a_.p.value_dim);
#pragma unroll
      for (int i = 0; i < 16 / kRows; ++i) {
        const uint4 x = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(&tile) +
                                                        Tile::offset(store_row + i * kRows, chunk));
        if (is_written && i * kRows < rows_left) {
          *reinterpret_cast<uint4*>(gO + i * step + col) = x;
        }
      }
    }
  }

  // O row by row. Neighbouring lanes exchange words, so that the quad of a row writes whole sectors
  // of 32 bytes.
  __device__ __forceinline__ void write() {
    const int lane = device::opaque_lane(), q = lane % 4;
    const bool is_odd = q % 2 != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row_ + 8 * half + lane / 4;
      const bool takes_part = row < job_.s.query_length, is_written = row < job_.s.query_rows;
      const float factor = factor_of(takes_part, half);
      clear_unseen(factor, half);
      if (q == 0 && is_written) job_.lse[row] = takes_part ? softmax_.lse(half) : -INFINITY;
      Element* gO = job_.o + row * a_.p.o.row_stride + (is_odd ? 2 * q + 6 : 2 * q);
      const int end = static_cast<int>(a_.p.value_dim) - (is_odd ? 8 : 0);
#pragma unroll
      for (int d = 0; d < Traits::kFragmentsV; d += 2) {
        const uint32_t left = pack_output(d, half, factor),
                       right = pack_output(d + 1, half, factor);
        const uint32_t other = __shfl_xor_sync(device::kWarp, is_odd ? left : right, 1);
        if (is_written && 8 * d < end) {
          *reinterpret_cast<uint2*>(gO + 8 * d) =
              is_odd ? make_uint2(other, right) : make_uint2(left, other);
        }
      }
    }
  }

 private:
  // What a row of O is multiplied by.
  __device__ __forceinline__ float factor_of(bool takes_part, int half) {
    float factor = takes_part ? softmax_.normalizer(half) : 0.0f;
    if (Traits::kHasDropout) factor *= dropout_scale(a_.p.dropout);
    return factor;
  }
  // 0 times a NaN of V, or of what was never written, is no zero.
  __device__ __forceinline__ void clear_unseen(float factor, int half) {
    if (factor == 0.0f) {
#pragma unroll
      for (int d = 0; d < Traits::kFragmentsV; ++d) rO_[d][2 * half] = rO_[d][2 * half + 1] = 0.0f;
    }
  }
  __device__ __forceinline__ uint32_t pack_output(int d, int half, float factor) const {
    return device::pack<Element>(rO_[d][2 * half] * factor, rO_[d][2 * half + 1] * factor);
  }

  const ForwardArguments& a_;
  const typename Traits::Job& job_;
  const int first_row_;
  const RowSoftmax<Element>& softmax_;
  float (&rO_)[Traits::kFragmentsV][4];
};

}  // namespace jax_flash::attention::sm90
