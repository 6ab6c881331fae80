// Flash attention backward on one tile of queries, one query a vector lane in the transposed
// matrices; P is recomputed from lse:
//
//   P = exp2(c S - lse log2(e)),   dP^T = V dO^T,   dS = P (dP - delta),   delta = rowsum(dO O) -
//   dlse dV += P^T dO,   dK += dS^T Q,   dQ^T = K^T dS^T
//
// dV and dK sum over the lanes of P^T and dS^T, which there are the broadcast operand, with a
// head's dims in the lanes; they are added to the caller's accumulators, dQ is complete. The scale,
// and dropout's, is applied once at the end. docs/kernels/cpu.md.
#pragma once

#include "attention/cpu/isa/forward.h"

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {

struct BackwardScratch {
  BackwardScratch(const BackwardParams& p, int64_t lanes, void* base) : arena(base) {
    lane_stride = odd_lines(lanes);
    head_stride = odd_lines(p.head_dim);
    value_stride = odd_lines(p.value_dim);
    q_rows = arena.take(lanes * head_stride);
    q_t = arena.take(lane_stride * p.head_dim / kPack);
    q_pairs = kPack == 1 ? q_rows : arena.take(lanes / kPack * head_stride);
    dout_rows = arena.take(lanes * value_stride);
    dout_t = arena.take(lane_stride * p.value_dim / kPack);
    dout_pairs = kPack == 1 ? dout_rows : arena.take(lanes / kPack * value_stride);
    k_rows = arena.take(kKeyTile * p.head_dim / kPack);
    k_pairs = kPack == 1 ? k_rows : arena.take(kKeyTile * p.head_dim / kPack);
    v_rows = arena.take(kKeyTile * p.value_dim / kPack);
    s = arena.take(kKeyTile * lane_stride);
    dp = arena.take(kKeyTile * lane_stride);
    p_rows = kPack == 1 ? s : arena.take(kKeyTile * lane_stride / kPack);
    ds_rows = kPack == 1 ? dp : arena.take(kKeyTile * lane_stride / kPack);
    ds_pairs = kPack == 1 ? dp : arena.take(kKeyTile * lane_stride / kPack);
    dq_t = arena.take(p.head_dim * lane_stride);
    dq_rows = arena.take(p.head_dim * lanes);
    o_rows = arena.take(lanes * p.value_dim / kPack);
    o_t = arena.take(lane_stride * p.value_dim / kPack);
    lse_log2 = arena.take(lanes);
    delta = arena.take(lanes);
    draws = arena.take<uint32_t>(p.dropout.threshold > 0 ? lanes * kKeyTile / 2 : 0);
    tile = arena.take<QueryTile>(1);
  }
  Arena arena;
  int64_t lane_stride, head_stride, value_stride;  // lanes and dims, rounded up for the cache
  float *q_rows, *dout_rows;    // [lanes][head_stride] and [lanes][value_stride]; pairs: unpadded
  float *q_t, *dout_t;          // [head_dim / kPack][lane_stride], [value_dim / kPack][lane_stride]
  float *q_pairs, *dout_pairs;  // [lanes / kPack][head_stride], [lanes / kPack][value_stride]
  float *k_rows, *k_pairs;      // [kKeyTile][head_dim / kPack], [kKeyTile / kPack][head_dim]
  float* v_rows;                // [kKeyTile][value_dim / kPack]
  float *s, *dp;                // [kKeyTile][lane_stride]
  float *p_rows, *ds_rows;      // [kKeyTile][lane_stride / kPack]: P, dS, to sum over queries
  float* ds_pairs;              // [kKeyTile / kPack][lane_stride]: dS, to sum over keys
  float *dq_t, *dq_rows;        // [head_dim][lane_stride], [lanes][head_dim]
  float *o_rows, *o_t;          // [lanes][value_dim / kPack], [value_dim / kPack][lane_stride]
  float *lse_log2, *delta;      // [lanes]
  uint32_t* draws;              // [kKeyTile / 2][lanes]
  QueryTile* tile;
};

// delta = rowsum(dO O) - dlse, and lse in base 2; +inf, hence P = 0, for rows that do not exist or
// see no key. delta is summed in the order and by the instruction of dP = dO V^T: where a row sees
// one key, O = V and dP - delta is exactly 0.
inline void load_row_statistics(const BackwardParams& p, const Sequence& sequence, int64_t head,
                                int64_t begin, int64_t rows, int64_t lanes,
                                BackwardScratch& scratch) {
  const int64_t first = sequence.query_begin + begin, words = p.value_dim / kPack;
  load_tile(rows_of(p.o, p.dtype, sequence, head, first), rows, lanes, p.value_dim, scratch.o_rows,
            words);
  transpose(scratch.o_rows, lanes, words, words, scratch.o_t, scratch.lane_stride);
  for (int64_t i = 0; i < lanes; i += kLanes) {
    Float delta{};
    for (int64_t d = 0; d < words; ++d) {
      delta = multiply_add(load<Float>(scratch.o_t + d * scratch.lane_stride + i),
                           load<Float>(scratch.dout_t + d * scratch.lane_stride + i), delta);
    }
    store(scratch.delta + i, delta);
  }
  const float* lse = rows_of(p.lse, sequence, head, first);
  const float* dlse = p.dlse.data != nullptr ? rows_of(p.dlse, sequence, head, first) : nullptr;
  for (int64_t i = 0; i < lanes; ++i) {
    const bool sees_keys = i < rows && lse[i] != -__builtin_inff();
    scratch.lse_log2[i] = sees_keys ? lse[i] * kLog2E : __builtin_inff();
    if (!sees_keys) {
      scratch.delta[i] = 0;
    } else if (dlse != nullptr) {
      scratch.delta[i] -= dlse[i];
    }
  }
}

// S^T and dP^T -> P and dS in the layouts of the products that follow.
inline void score_gradients(int64_t keys, int64_t lanes, float scale_log2,
                            const DropoutState& dropout, const uint32_t* draws,
                            BackwardScratch& scratch) {
  const float keep_scale = dropout.keep_scale();
  const int64_t stride = scratch.lane_stride;
  for (int64_t j = 0; j < keys; j += 2) {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      const int64_t at = j * stride + i;
      const Float lse_log2 = load<Float>(scratch.lse_log2 + i);
      const Float delta = load<Float>(scratch.delta + i);
      Float p0 = exp2(load<Float>(scratch.s + at) * scale_log2 - lse_log2);
      Float p1 = exp2(load<Float>(scratch.s + at + stride) * scale_log2 - lse_log2);
      Float dp0 = load<Float>(scratch.dp + at), dp1 = load<Float>(scratch.dp + at + stride);
      Float kept0 = p0, kept1 = p1;
      if (dropout.threshold > 0) {
        const uint32_t* draw = draws + j / 2 * lanes + i;
        const Int keep0 = kept_even(draw, dropout.threshold);
        const Int keep1 = kept_odd(draw, dropout.threshold);
        kept0 = keep0 ? p0 : Float{};
        kept1 = keep1 ? p1 : Float{};
        dp0 = keep0 ? dp0 * keep_scale : Float{};
        dp1 = keep1 ? dp1 * keep_scale : Float{};
      }
      const Float ds0 = p0 * (dp0 - delta), ds1 = p1 * (dp1 - delta);
      store_words(kept0, kept1, stride, nullptr, scratch.p_rows + at / kPack);
      store_words(ds0, ds1, stride, scratch.ds_pairs + j / kPack * stride + i,
                  scratch.ds_rows + at / kPack);
    }
  }
}

// One key tile, or the part of it that this query tile can see, against the query tile.
inline void backward_step(const BackwardParams& p, const DropoutState& dropout, int64_t tile_begin,
                          KeyRange keys, TileKind kind, float scale_log2, float* dk, float* dv,
                          BackwardScratch& scratch) {
  const QueryTile& tile = *scratch.tile;
  const int64_t lanes = tile.lanes, vecs = lanes / kLanes, stride = scratch.lane_stride;
  const int64_t skipped = keys.begin - tile_begin, count = keys.end - keys.begin;
  const int64_t head_words = p.head_dim / kPack, value_words = p.value_dim / kPack;

  // S^T = K Q^T and dP^T = V dO^T
  product<Order::kRowMajor, Start::kZero>({scratch.k_rows + skipped * head_words, head_words},
                                          count, {scratch.q_t, stride}, vecs, {scratch.s, stride},
                                          head_words);
  if (kind == TileKind::kPartial) mask_scores(tile, 0, vecs, keys, scratch.s, stride);
  product<Order::kRowMajor, Start::kZero>({scratch.v_rows + skipped * value_words, value_words},
                                          count, {scratch.dout_t, stride}, vecs,
                                          {scratch.dp, stride}, value_words);

  score_gradients(count, lanes, scale_log2, dropout, scratch.draws + skipped / 2 * lanes, scratch);

  // dV += P^T dO and dK += dS^T Q
  const int64_t dk_stride = round_up(p.head_dim, kLanes), dv_stride = round_up(p.value_dim, kLanes);
  product<Order::kRowMajor, Start::kAdd>(
      {scratch.p_rows, stride / kPack}, count, {scratch.dout_pairs, scratch.value_stride},
      dv_stride / kLanes, {dv + keys.begin * dv_stride, dv_stride}, lanes / kPack);
  product<Order::kRowMajor, Start::kAdd>({scratch.ds_rows, stride / kPack}, count,
                                         {scratch.q_pairs, scratch.head_stride}, dk_stride / kLanes,
                                         {dk + keys.begin * dk_stride, dk_stride}, lanes / kPack);

  // dQ^T += K^T dS^T
  product<Order::kStepMajor, Start::kAdd>(
      {scratch.k_pairs + skipped / kPack * p.head_dim, p.head_dim}, p.head_dim,
      {scratch.ds_pairs, stride}, vecs, {scratch.dq_t, stride}, count / kPack);
}

inline void backward_tile(const BackwardParams& p, const Sequence& sequence, int64_t head,
                          int64_t begin, int64_t rows, void* base, float* dk, float* dv) {
  const int64_t lanes = round_up(rows, 16);
  BackwardScratch scratch(p, lanes, base);
  const int64_t head_words = p.head_dim / kPack, value_words = p.value_dim / kPack;
  const int64_t query_row = sequence.query_begin + begin;
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  const float scale_log2 = (p.scale == 0 ? 1.0f : __builtin_fabsf(p.scale)) * kLog2E;
  const DropoutState dropout = dropout_of(p, sequence, head);

  QueryTile& tile = *scratch.tile;
  make_query_tile(p, sequence, head, 1, begin, static_cast<int>(rows), static_cast<int>(lanes),
                  tile);
  const int64_t q_stride = kPack == 1 ? scratch.head_stride : head_words;
  load_tile(rows_of(p.q, p.dtype, sequence, head, query_row), rows, lanes, p.head_dim,
            scratch.q_rows, q_stride);
  apply_sign(scratch.q_rows, lanes * q_stride, p.scale);
  transpose(scratch.q_rows, lanes, head_words, q_stride, scratch.q_t, scratch.lane_stride);
  const int64_t dout_stride = kPack == 1 ? scratch.value_stride : value_words;
  load_tile(rows_of(p.dout, p.dtype, sequence, head, query_row), rows, lanes, p.value_dim,
            scratch.dout_rows, dout_stride);
  transpose(scratch.dout_rows, lanes, value_words, dout_stride, scratch.dout_t,
            scratch.lane_stride);
  if (kPack == 2) {
    pair_rows(scratch.q_rows, lanes, p.head_dim, q_stride, scratch.q_pairs, scratch.head_stride);
    pair_rows(scratch.dout_rows, lanes, p.value_dim, dout_stride, scratch.dout_pairs,
              scratch.value_stride);
  }
  load_row_statistics(p, sequence, head, begin, rows, lanes, scratch);
  std::memset(scratch.dq_t, 0, scratch.lane_stride * p.head_dim * 4);

  const KeyRange seen = visible_keys(tile, 0, static_cast<int>(lanes));
  for (int64_t j = seen.begin / kKeyTile * kKeyTile; j < seen.end; j += kKeyTile) {
    const int64_t loaded = least(kKeyTile, sequence.len_k - j), padded = round_up(loaded, 8);
    const KeyRange keys = {most(j, seen.begin / 8 * 8), least(j + padded, round_up(seen.end, 8))};
    const TileKind kind = ask(tile, 0, static_cast<int>(lanes), keys);
    if (kind == TileKind::kSkip) continue;
    const int64_t key_row = sequence.key_begin + j;
    load_tile(rows_of(p.k, p.dtype, sequence, kv_head, key_row), loaded, padded, p.head_dim,
              scratch.k_rows, head_words);
    load_tile(rows_of(p.v, p.dtype, sequence, kv_head, key_row), loaded, padded, p.value_dim,
              scratch.v_rows, value_words);
    if (kPack == 2) {
      pair_rows(scratch.k_rows, padded, p.head_dim, head_words, scratch.k_pairs, p.head_dim);
    }
    if (dropout.threshold > 0) draw_tile(dropout, j, loaded, begin, lanes, scratch.draws);
    backward_step(p, dropout, j, keys, kind, scale_log2, dk, dv, scratch);
  }

  // dQ = scale dQ^T, transposed
  const Float scale = splat(p.scale);
  for (int64_t at = 0; at < scratch.lane_stride * p.head_dim; at += kLanes) {
    store(scratch.dq_t + at, load<Float>(scratch.dq_t + at) * scale);
  }
  transpose(scratch.dq_t, p.head_dim, lanes, scratch.lane_stride, scratch.dq_rows, p.head_dim);
  const Rows16or32 dq = rows_of(p.dq, p.dtype, sequence, head, query_row);
  for (int64_t i = 0; i < rows; ++i) {
    store_row(scratch.dq_rows + i * p.head_dim, p.dtype, p.head_dim, dq.data + i * dq.stride_bytes);
  }
}

// Sums the parts of one gradient into the first, scales and stores it.
inline void store_gradient(Rows16or32 out, int64_t rows, int64_t dim, int64_t stride, float factor,
                           float* sums, int64_t parts, int64_t part_stride) {
  const Float scale = splat(factor);
  for (int64_t r = 0; r < rows; ++r, sums += stride) {
    for (int64_t d = 0; d < stride; d += kLanes) {
      Float total = load<Float>(sums + d);
      for (int64_t part = 1; part < parts; ++part) {
        total += load<Float>(sums + part * part_stride + d);
      }
      store(sums + d, total * scale);
    }
    store_row(sums, out.dtype, dim, out.data + r * out.stride_bytes);
  }
}

inline void store_key_gradients(const BackwardParams& p, const Sequence& sequence, int64_t kv_head,
                                int64_t begin, int64_t rows, float* dk, float* dv, int64_t parts,
                                int64_t part_stride) {
  const int64_t head_stride = round_up(p.head_dim, kLanes);
  const int64_t value_stride = round_up(p.value_dim, kLanes);
  const int64_t row = sequence.key_begin + begin;
  // dK was summed with Q under the scale's sign, which leaves its size.
  store_gradient(rows_of(p.dk, p.dtype, sequence, kv_head, row), rows, p.head_dim, head_stride,
                 __builtin_fabsf(p.scale), dk + begin * head_stride, parts, part_stride);
  store_gradient(rows_of(p.dv, p.dtype, sequence, kv_head, row), rows, p.value_dim, value_stride,
                 65536.0f / static_cast<float>(65536 - p.dropout.threshold),
                 dv + begin * value_stride, parts, part_stride);
}

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
