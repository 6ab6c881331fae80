// A consumer of the Hopper forward kernel: a warpgroup that owns 64 rows of a tile of queries. It
// takes the steps (tiles of keys) of job after job as one stream, S of the next under O += P V of
// the one before, and writes O and lse at the end of each job. Who waits for whom:
// docs/kernels/hopper_forward.md. What it does with a tile that is not plain is in
// forward_mask.cuh, with dropout in forward_dropout.cuh, with a finished O in forward_output.cuh.
#pragma once

#include "attention/cuda/sm90/forward_dropout.cuh"
#include "attention/cuda/sm90/forward_mask.cuh"
#include "attention/cuda/sm90/forward_output.cuh"
#include "attention/cuda/sm90/forward_traits.cuh"
#include "attention/cuda/sm90/softmax.cuh"
#include "device/element.cuh"
#include "device/opaque.cuh"
#include "device/warp.cuh"
#include "ptx/wgmma.cuh"

namespace jax_flash::attention::sm90 {

// One warpgroup of 64 rows. Everything but the references is in registers.
template <typename Traits>
class ForwardConsumer {
 public:
  using Element = typename Traits::Element;
  using Job = typename Traits::Job;
  using QueryTile = typename Traits::QueryTile;
  using KeyTile = typename Traits::KeyTile;
  using ValueTile = typename Traits::ValueTile;

  __device__ ForwardConsumer(typename Traits::Smem& smem, const ForwardArguments& a, int warpgroup)
      : smem_(smem), a_(a), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
    if (warpgroup_ == Traits::kConsumers - 1) give_turn();  // the first warpgroup's
    Step step = Step::end();                                // the one whose P waits for its V
    for (;;) {
      steps_ = device::uniform(steps_);
      Step next = Step::end();
      bool is_seen = false;
      // Where the next job cannot begin under this one's last P V, that goes while its Q and K
      // come.
      const bool ends_alone =
          !Traits::kFlattened && a_.ends_alone && !step.is_end() && step.is_last();
      if (!ends_alone) {
        wait_key();
        if (step.is_before_plain(Traits::kPlainAlone ? warpgroup_ : 0)) {
          step = overlap<true>(step, Step::end());
          continue;
        }
        next = Step(device::uniform(smem_.step[Key(steps_).stage]));
        is_seen = !next.is_end() && sees(next);
        if (!step.is_end() && is_seen && (Traits::kFlattened || !next.is_first())) {
          step = overlap<false>(step, next);
          continue;
        }
      }
      if (!step.is_end()) multiply_value(step);
      step = Step::end();
      if (ends_alone) continue;
      if (next.is_end()) break;
      if (is_seen) {
        multiply_query(next);
        step = next;
      } else {
        skip(next);
      }
    }
    // Shared memory must live until O has been read.
    if (Traits::kCopiesOutput && lane() == 0) ptx::bulk_wait<0, true>();
  }

 private:
  using Query = Place<Traits::kQueryStages>;
  using Key = Place<Traits::kKeyStages>;
  using Value = Place<Traits::kValueStages>;

  // Does this warpgroup see anything of the tile?
  __device__ bool sees(Step next) const { return next.view(warpgroup_) != View::kNothing; }
  __device__ const Job& job_of(uint32_t job) const { return smem_.job[job % Traits::kJobs]; }
  __device__ static int lane() { return device::opaque_lane(); }
  __device__ int first_row() const { return row_of_warp(warpgroup_); }

  // S of the next step under O += P V of this one, then P of the next; returns it. kIsPlain: the
  // next tile is full and of the same job, and `next` still to be read.
  template <bool kIsPlain>
  __device__ __forceinline__ Step overlap(Step step, Step next) {
    if (!kIsPlain && next.is_first()) load_query();
    take_turn();
    issue_scores(kIsPlain ? job_ : job_ + next.is_first());
    if (kIsPlain) next = Step(device::uniform(smem_.step[Key(steps_).stage]));
    issue_value();
    give_turn();
    ptx::wgmma_wait<1>();  // S
    ptx::wgmma_pin(rS_[0]);

    const RowSoftmax<Element> finished = softmax_;
    const uint32_t job = job_;
    if (!kIsPlain) begin(next);
    bool moved = false;
    const bool is_good = to_probabilities<kIsPlain, (!kIsPlain && Traits::kFlattened)>(next, moved);
    if (kIsPlain || is_good) release_operands(next);
    ptx::wgmma_wait<0>();  // O
    ptx::wgmma_pin(rO_);
    ptx::wgmma_pin(rP_);
    if (moved && !Traits::kHasRoom) rescale();  // where ptxas spills less
    release_value();
    pack_probabilities();
    if (moved && Traits::kHasRoom) rescale();
    if (!kIsPlain && step.is_last()) {
      finish(job, finished);
    } else if (kIsPlain || !next.is_first()) {
      is_fresh_ = false;
    }
    if (!kIsPlain && !is_good) begin_again(next);
    ++steps_;
    return next;
  }

  // O += P V with nothing beside it.
  __device__ __forceinline__ void multiply_value(Step step) {
    issue_value();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(rO_);
    ptx::wgmma_pin(rP_);
    release_value();
    is_fresh_ = false;
    if (step.is_last()) finish(job_, softmax_);
  }

  // S and P of a step with nothing beside it.
  __device__ __forceinline__ void multiply_query(Step next) {
    if (next.is_first()) load_query();
    take_turn();
    issue_scores(job_ + next.is_first());
    give_turn();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(rS_[0]);
    begin(next);
    bool moved = false;
    if (to_probabilities<false, Traits::kTeams == 1>(next, moved)) {
      if (moved) rescale();
      release_operands(next);
      pack_probabilities();
    } else {
      begin_again(next);
    }
    ++steps_;
  }

  // A tile that only other warpgroups see.
  __device__ __forceinline__ void skip(Step next) {
    if (next.is_first()) load_query();
    take_turn();
    give_turn();
    begin(next);
    release_operands(next);
    ++steps_;
    const Value value(steps_ - 1);
    ptx::mbarrier_wait(smem_.v_full[value.stage], value.parity);  // no phase may be missed
    release_value();
    if (next.is_last()) finish(job_, softmax_);
  }

  __device__ __forceinline__ void begin(Step next) {
    if (next.is_first()) {
      ++job_;
      softmax_.reset();
      is_fresh_ = true;
      if constexpr (Traits::kHasDropout) {
        const Job& job = job_of(job_);
        dropout_.begin(job.dropout, job.s.first_row + first_row());
      }
    }
  }
  // P of the step is there (or not wanted).
  __device__ __forceinline__ void release_operands(Step next) {
    release_read(smem_.k_empty[Key(steps_).stage]);  // and the step's word
    // A Q in shared memory is free after the last product with it.
    if (!Traits::kQueryInRegisters && next.is_last()) {
      release(smem_.q_empty[Query(job_).stage]);
    }
  }
  __device__ __forceinline__ void wait_key() {
    const Key place(steps_);
    ptx::mbarrier_wait(smem_.k_full[place.stage], place.parity);
  }

  __device__ __forceinline__ void load_query() {
    const Query place(job_ + 1);
    ptx::mbarrier_wait(smem_.q_full[place.stage], place.parity);
    if constexpr (Traits::kQueryInRegisters) {
      using Address = device::LdmatrixAddress<QueryTile>;
      const Address address(smem_.query[place.stage], Address::Order::kRowsFirst, first_row(),
                            lane());
#pragma unroll
      for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
        ptx::ldmatrix_x4(rQ_[k], address(0, 16 * k));
      }
      // NOTE: once the last load has ended: of an arrival behind loads that are on their way the
      // copy engine overwrote rows of Q, in one of 50 calls beside other processes' (H200,
      // 2026-11-28).
      __syncwarp();
      if (lane() == 0) {
        ptx::mbarrier_arrive_after(smem_.q_empty[place.stage], rQ_[Traits::kHeadDim / 16 - 1][3]);
      }
    }
  }

  // S = Q K^T, with the Q of job `job`
  __device__ __forceinline__ void issue_scores(uint32_t job) {
    const ptx::MatrixDescriptor key(&smem_.key[Key(steps_).stage], KeyTile::kSlabBytes);
    const auto* query_rows = reinterpret_cast<const char*>(&smem_.query[Query(job).stage]) +
                             warpgroup_ * 64 * QueryTile::kRowBytes;
    const ptx::MatrixDescriptor query(query_rows, QueryTile::kSlabBytes);
    ptx::wgmma_pin(rS_[0]);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      const auto key_k = key + k / 4 * (KeyTile::kSlabBytes >> 4) + k % 4 * ptx::kColumns16;
      if constexpr (Traits::kQueryInRegisters) {
        ptx::wgmma<Element, false>(rS_[0], rQ_[k], key_k, k > 0);
      } else {
        ptx::wgmma<Element, false, false>(
            rS_[0], query + k / 4 * (QueryTile::kSlabBytes >> 4) + k % 4 * ptx::kColumns16, key_k,
            k > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // O += P V of the step before, or O = P V for the first tile of a job
  __device__ __forceinline__ void issue_value() {
    const Value place(steps_ - 1);
    ptx::mbarrier_wait(smem_.v_full[place.stage], place.parity);
    const ptx::MatrixDescriptor value(&smem_.value[place.stage], ValueTile::kSlabBytes);
    ptx::wgmma_pin(rO_);
    ptx::wgmma_pin(rP_);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kBlockN / 16; ++k) {
      ptx::wgmma<Element, true>(rO_, rP_[k], value + k * ptx::kRows16, k > 0 || !is_fresh_);
    }
    ptx::wgmma_commit();
  }

  // S -> P. `moved`: a reference has, and the caller must rescale O, as soon as the product that
  // may still add to it, which belongs to the old reference, is there. False where the guess that
  // begins a job (kBeginsJobs) was none too good: begin_again.
  template <bool kIsPlain, bool kBeginsJobs>
  __device__ __forceinline__ bool to_probabilities(Step next, bool& moved) {
    bool is_good = true;
    float alpha[2];
    if (!kIsPlain) {
      if (kBeginsJobs && Traits::kGuesses && next.is_first() &&
          next.view(warpgroup_) >= View::kEdge && (Traits::kTeams == 1 || a_.guesses)) {
        is_good = unusual_tiles().guess(next, softmax_, rS_);
      } else {
        moved = unusual_tiles().update(next, softmax_, rS_, alpha) && !next.is_first();
        if (moved) keep(alpha);
      }
      draw();
    } else if (!softmax_.try_update(rS_[0], a_.scale_log2, [this](int i) {
                 draw(i);
                 return Traits::kHasDropout ? dropout_.scale_after(i, a_) : a_.scale_log2;
               })) {
      multiply_query_again();
      moved = softmax_.template update<true>(rS_[0], a_.scale_log2, alpha);
      keep(alpha);
      draw();
    }
    return is_good;
  }

  __device__ __forceinline__ UnusualTiles<Traits> unusual_tiles() const {
    return UnusualTiles<Traits>(a_, smem_, job_, warpgroup_);
  }
  // S and P of the first tile of a job once more, by its maximum. Rare.
  __device__ __forceinline__ void begin_again(Step next) {
    if constexpr (Traits::kGuesses) {
      float alpha[2];
      softmax_.reset();
      multiply_query_again();
      unusual_tiles().update(next, softmax_, rS_, alpha);
      draw();
      release_operands(next);
      pack_probabilities();
    }
  }

  // With dropout: packs columns 16 i to 16 i + 15 of P, and draws which are kept; of all columns.
  __device__ __forceinline__ void draw(int i) {
    if constexpr (Traits::kHasDropout) {
      dropout_.draw(i, smem_.columns[Key(steps_).stage], rS_[0][2 * i], rS_[0][2 * i + 1]);
    }
  }
  __device__ __forceinline__ void draw() {
#pragma unroll
    for (int i = 0; i < Traits::kBlockN / 16; ++i) draw(i);
  }

  // S of this warp's 16 rows once more, on mma.sync, which needs no other warp: the exponentials
  // have overwritten it. Rare.
  __device__ __forceinline__ void multiply_query_again() {
    using QueryAddress = device::LdmatrixAddress<QueryTile>;
    using KeyAddress = device::LdmatrixAddress<KeyTile>;
    const QueryAddress query(smem_.query[Query(device::opaque(job_)).stage],
                             QueryAddress::Order::kRowsFirst, first_row(), lane());
    const KeyAddress key(smem_.key[Key(device::opaque(steps_)).stage],
                         KeyAddress::Order::kColsFirst, 0, lane());
#pragma unroll
    for (int n = 0; n < Traits::kFragmentsN; ++n) {
      rS_[0][n][0] = rS_[0][n][1] = rS_[0][n][2] = rS_[0][n][3] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      uint32_t (&rQ)[4] = rQ_[Traits::kQueryInRegisters ? k : 0];
      if (!Traits::kQueryInRegisters) ptx::ldmatrix_x4(rQ, query(0, 16 * k));
#pragma unroll
      for (int n = 0; n < Traits::kFragmentsN; n += 2) {
        uint32_t rK[4];
        ptx::ldmatrix_x4(rK, key(8 * n, 16 * k));
        ptx::mma_16x8x16<Element>(rS_[0][n], rQ, rK[0], rK[1]);
        ptx::mma_16x8x16<Element>(rS_[0][n + 1], rQ, rK[2], rK[3]);
      }
    }
  }

  __device__ __forceinline__ void pack_probabilities() {
#pragma unroll
    for (int k = 0; k < Traits::kBlockN / 16; ++k) {
      if constexpr (Traits::kHasDropout) {
        dropout_.pack(k, rP_[k]);
      } else {
        device::pack_operand<Element>(rP_[k], rS_[0][2 * k], rS_[0][2 * k + 1]);
      }
    }
  }

  // Multiplies O by the alpha that was kept. NOTE: in shared memory, since registers for what is
  // rare are spilled. The warps of a warpgroup must wait for a product at the same instruction, so
  // that O cannot be rescaled where the reference moves.
  __device__ __forceinline__ void keep(const float (&alpha)[2]) {
    const int lane = this->lane();
    if (lane % 4 == 0) {
      kept_alpha()[lane / 4] = alpha[0];
      kept_alpha()[lane / 4 + 8] = alpha[1];
    }
    __syncwarp();  // The rows' factors are there.
  }
  __device__ __forceinline__ void rescale() {
    const int row = lane() / 4;
    const float alpha[2] = {kept_alpha()[row], kept_alpha()[row + 8]};
#pragma unroll
    for (int d = 0; d < Traits::kFragmentsV; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rO_[d][e] *= alpha[e / 2];
    }
    __syncwarp();  // The factors have been read.
  }
  __device__ __forceinline__ float* kept_alpha() const { return &smem_.alpha[first_row()]; }

  // Normalises O, writes it and lse.
  __device__ __forceinline__ void finish(uint32_t job_idx, RowSoftmax<Element> softmax) {
    const Job& job = job_of(job_idx);
    const int first_row = job.s.first_row + this->first_row();
    softmax.finish();
    ForwardOutput<Traits> output(a_, job, first_row, softmax, rO_);
    // The copy engine knows where the array ends, but not a sequence in it.
    if (Traits::kCopiesOutput &&
        device::uniform(!a_.p.mask.varlen || first_row + 16 <= job.s.query_rows)) {
      output.copy(smem_.output[4 * warpgroup_ + this->first_row() % 64 / 16]);
    } else if (Traits::kWritesLines) {
      output.write_lines(smem_.output[4 * warpgroup_ + this->first_row() % 64 / 16]);
    } else {
      output.write();
    }
    release_read(smem_.job_empty[job_idx % Traits::kJobs]);
  }

  // One arrival of the warp (release_read: of each lane), once all of them are through. NOTE: where
  // registers are few, lane 0 is asked of the warp, since the thread's number would be read again
  // in every step, 80 clocks each.
  __device__ __forceinline__ void release(ptx::Mbarrier& barrier) {
    __syncwarp();
    if (Traits::kWarpgroups > 2 ? ptx::elect_one() : lane() == 0) ptx::mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void release_value() {
    release(smem_.v_empty[Value(steps_ - 1).stage]);
  }
  // The warpgroups issue their products in turn, so that one's softmax runs under another's
  // products. Two teams are out of step anyway: turns cost 6% there (H200, head dim 64, causal).
  static constexpr bool kTakesTurns = Traits::kTeams == 1;
  __device__ __forceinline__ void take_turn() {
    if (kTakesTurns) ptx::named_barrier_sync(1 + warpgroup_, 256);
  }
  __device__ __forceinline__ void give_turn() {
    if (kTakesTurns) ptx::named_barrier_arrive(1 + (warpgroup_ + 1) % Traits::kConsumers, 256);
  }

  typename Traits::Smem& smem_;
  const ForwardArguments& a_;
  const int warpgroup_;
  uint32_t steps_ = 0;    // K consumed so far
  uint32_t job_ = ~0u;    // jobs begun so far, less one
  bool is_fresh_ = true;  // nothing was added to O yet
  RowSoftmax<Element> softmax_;
  float rS_[1][Traits::kFragmentsN][4], rO_[Traits::kFragmentsV][4];
  uint32_t rP_[Traits::kBlockN / 16][4];
  ForwardDropout<Traits> dropout_;
  uint32_t rQ_[Traits::kQueryInRegisters ? Traits::kHeadDim / 16 : 1][4];
};

}  // namespace jax_flash::attention::sm90
