// Flash attention forward on one tile of queries, one query a vector lane:
//
//   S^T = K Q^T,  m' = max(m, S),  P = exp2(c S - c m'),  l = l exp2(c m - c m') + sum P,
//   O^T = O^T exp2(c m - c m') + V^T P,   at the end O / l and lse = c m' / log2(e) + log(l)
//
// with c = |scale| log2(e) and the scale's sign in Q. Keys go down the rows of S^T, so maxima and
// sums are plain vector operations, K and V are broadcast operands that need no packing, and a
// panel of kBlockVecs vectors of queries keeps Q^T and P in the L1 cache. docs/kernels/cpu.md.
#pragma once

#include "attention/cpu/isa/dropout.h"
#include "attention/cpu/isa/mask_tile.h"

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {

inline constexpr int kKeyTile = 64;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr double kLn2 = 0.6931471805599453;

struct ForwardScratch {
  ForwardScratch(const ForwardParams& p, int64_t lanes, void* base) : arena(base) {
    const int64_t panel = kBlockVecs * kLanes;
    lane_stride = odd_lines(lanes);
    q_rows = arena.take(lanes * p.head_dim / kPack);
    q_t = arena.take(lane_stride * p.head_dim / kPack);
    k = arena.take(kKeyTile * p.head_dim / kPack);
    v_rows = arena.take(kKeyTile * p.value_dim / kPack);
    v = kPack == 1 ? v_rows : arena.take(kKeyTile * p.value_dim / kPack);
    s = arena.take(kKeyTile * panel);
    words = kPack == 1 ? s : arena.take(kKeyTile * panel / kPack);
    o_t = arena.take(lane_stride * p.value_dim);
    o_rows = arena.take(lanes * p.value_dim);
    m = arena.take(lanes);
    l = arena.take(lanes);
    alpha = arena.take(lanes);
    draws = arena.take<uint32_t>(p.dropout.threshold > 0 ? lanes * kKeyTile / 2 : 0);
    tile = arena.take<QueryTile>(1);
  }
  Arena arena;
  int64_t lane_stride;
  float* q_rows;    // [lanes][head_dim / kPack]
  float* q_t;       // [head_dim / kPack][lane_stride]
  float* k;         // [kKeyTile][head_dim / kPack]
  float* v_rows;    // [kKeyTile][value_dim / kPack]
  float* v;         // [kKeyTile / kPack][value_dim]
  float* s;         // [kKeyTile][panel]: scores of one panel, then P
  float* words;     // [kKeyTile / kPack][panel]: P as words
  float* o_t;       // [value_dim][lane_stride]
  float* o_rows;    // [lanes][value_dim]
  float* m;         // [lanes]: maximum of the scores so far, without the scale
  float* l;         // [lanes]: sum of P so far
  float* alpha;     // [lanes]: what O and l shrink by in this step
  uint32_t* draws;  // [kKeyTile / 2][lanes]
  QueryTile* tile;
};

// S^T -> P^T (as words) for one panel of kVecs vectors; m, l and alpha move on.
template <int kVecs>
void online_softmax(float* s, int64_t stride, int64_t keys, float scale_log2, float* m, float* l,
                    float* alpha, const uint32_t* draws, int64_t draws_stride, uint32_t threshold,
                    float* words) {
  Float row_max[kVecs], shift[kVecs], total[kVecs];
  for (int v = 0; v < kVecs; ++v) row_max[v] = load<Float>(m + v * kLanes);
  for (int64_t j = 0; j < keys; ++j) {
    for (int v = 0; v < kVecs; ++v) {
      row_max[v] = max(load<Float>(s + j * stride + v * kLanes), row_max[v]);
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    // A row that has seen nothing keeps m = -inf; any finite shift then gives P = 0, not NaN.
    const Int is_empty = row_max[v] == -__builtin_inff();
    shift[v] = is_empty ? Float{} : row_max[v] * scale_log2;
    const Float shrink = exp2(load<Float>(m + v * kLanes) * scale_log2 - shift[v]);
    store(alpha + v * kLanes, shrink);
    store(m + v * kLanes, row_max[v]);
    total[v] = load<Float>(l + v * kLanes) * shrink;
  }
  for (int64_t j = 0; j < keys; j += 2) {
    for (int v = 0; v < kVecs; ++v) {
      const float* at = s + j * stride + v * kLanes;
      Float even = exp2(load<Float>(at) * scale_log2 - shift[v]);
      Float odd = exp2(load<Float>(at + stride) * scale_log2 - shift[v]);
      total[v] += even + odd;  // lse is of the softmax before dropout
      if (threshold > 0) {
        const uint32_t* draw = draws + j / 2 * draws_stride + v * kLanes;
        even = kept_even(draw, threshold) ? even : Float{};
        odd = kept_odd(draw, threshold) ? odd : Float{};
      }
      store_words(even, odd, stride, words + j / kPack * stride + v * kLanes, nullptr);
    }
  }
  for (int v = 0; v < kVecs; ++v) store(l + v * kLanes, total[v]);
}

// Q^T under the scale's sign, from the rows of each head in turn.
inline void load_queries(const ForwardParams& p, const Sequence& sequence, int64_t head,
                         int64_t rows, ForwardScratch& scratch) {
  const QueryTile& tile = *scratch.tile;
  const int64_t words = p.head_dim / kPack, row = sequence.query_begin + tile.begin;
  for (int64_t h = 0; h < tile.heads; ++h) {
    // The last head's tile goes on to the last lane, with zeros.
    const int64_t padded = h + 1 < tile.heads ? rows : tile.lanes - h * rows;
    load_tile(rows_of(p.q, p.dtype, sequence, head + h, row), rows, padded, p.head_dim,
              scratch.q_rows + h * rows * words, words);
  }
  apply_sign(scratch.q_rows, tile.lanes * words, p.scale);
  transpose(scratch.q_rows, tile.lanes, words, words, scratch.q_t, scratch.lane_stride);
}

// O = O^T / l and lse for the rows that exist.
inline void finish_tile(const ForwardParams& p, const Sequence& sequence, int64_t head,
                        int64_t rows, float scale_log2, float keep_scale, ForwardScratch& scratch) {
  const QueryTile& tile = *scratch.tile;
  const int64_t lanes = tile.lanes, row = sequence.query_begin + tile.begin;
  for (int64_t i = 0; i < lanes; ++i) {
    // l == 0 is a row without keys; NaN is not, and must come out.
    scratch.alpha[i] = scratch.l[i] == 0 ? 0.0f : keep_scale / scratch.l[i];
  }
  for (int64_t d = 0; d < p.value_dim; ++d) {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      float* place = scratch.o_t + d * scratch.lane_stride + i;
      store(place, load<Float>(place) * load<Float>(scratch.alpha + i));
    }
  }
  transpose(scratch.o_t, p.value_dim, lanes, scratch.lane_stride, scratch.o_rows, p.value_dim);
  for (int64_t h = 0, lane = 0; h < tile.heads; ++h) {
    const Rows16or32 out = rows_of(p.o, p.dtype, sequence, head + h, row);
    float* lse = rows_of(p.lse, sequence, head + h, row);
    for (int64_t i = 0; i < rows; ++i, ++lane) {
      const float l = scratch.l[lane];
      const float shift = scratch.m[lane] * scale_log2;  // the very one that P was shifted by
      lse[i] =
          l == 0 ? -__builtin_inff() : static_cast<float>(shift * kLn2 + __builtin_log(double{l}));
      store_row(scratch.o_rows + lane * p.value_dim, out.dtype, p.value_dim,
                out.data + i * out.stride_bytes);
    }
  }
}

// The keys [keys.begin, keys.end) of one key tile against one panel of the query tile.
inline void forward_panel(const ForwardParams& p, const DropoutState& dropout, int64_t tile_begin,
                          int64_t tile_end, int64_t lane, int64_t vecs, float scale_log2,
                          ForwardScratch& scratch) {
  const QueryTile& tile = *scratch.tile;
  const int64_t lanes = tile.lanes, panel = vecs * kLanes;
  const int lane_begin = static_cast<int>(lane), lane_end = static_cast<int>(lane + panel);

  // Only the keys that this panel can see, in whole blocks of 8 rows.
  const KeyRange seen = visible_keys(tile, lane_begin, lane_end);
  const KeyRange keys = {most(tile_begin, seen.begin / 8 * 8),
                         least(round_up(tile_end, 8), round_up(seen.end, 8))};
  const TileKind kind = keys.begin < keys.end ? ask(tile, lane_begin, lane_end, keys)  //
                                              : TileKind::kSkip;
  if (kind == TileKind::kSkip) return;
  const int64_t skipped = keys.begin - tile_begin, count = keys.end - keys.begin;
  const int64_t head_words = p.head_dim / kPack;

  // S^T = K Q^T
  product<Order::kRowMajor, Start::kZero>({scratch.k + skipped * head_words, head_words}, count,
                                          {scratch.q_t + lane, scratch.lane_stride}, vecs,
                                          {scratch.s, panel}, head_words);
  if (kind == TileKind::kPartial) {
    mask_scores(tile, lane_begin, vecs, keys, scratch.s, panel);
  }

  // P, m, l
  const auto softmax = vecs == 1   ? online_softmax<1>
                       : vecs == 2 ? online_softmax<2>
                                   : online_softmax<kBlockVecs>;
  softmax(scratch.s, panel, count, scale_log2, scratch.m + lane, scratch.l + lane,
          scratch.alpha + lane, scratch.draws + skipped / 2 * lanes + lane, lanes,
          dropout.threshold, scratch.words);

  // O^T = O^T alpha + V^T P
  product<Order::kStepMajor, Start::kScale>(
      {scratch.v + skipped / kPack * p.value_dim, p.value_dim}, p.value_dim, {scratch.words, panel},
      vecs, {scratch.o_t + lane, scratch.lane_stride}, count / kPack, scratch.alpha + lane);
}

inline void forward_tile(const ForwardParams& p, const Sequence& sequence, int64_t head,
                         int64_t heads, int64_t begin, int64_t rows, void* base) {
  const int64_t lanes = round_up(heads * rows, 16);
  ForwardScratch scratch(p, lanes, base);
  const int64_t head_words = p.head_dim / kPack;
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  const float scale_log2 = (p.scale == 0 ? 1.0f : __builtin_fabsf(p.scale)) * kLog2E;
  const DropoutState dropout = dropout_of(p, sequence, head);

  QueryTile& tile = *scratch.tile;
  make_query_tile(p, sequence, head, static_cast<int>(heads), begin, static_cast<int>(heads * rows),
                  static_cast<int>(lanes), tile);
  load_queries(p, sequence, head, rows, scratch);
  for (int64_t i = 0; i < lanes; ++i) {
    scratch.m[i] = -__builtin_inff();
    scratch.l[i] = 0;
  }
  std::memset(scratch.o_t, 0, scratch.lane_stride * p.value_dim * 4);

  const KeyRange seen = visible_keys(tile, 0, static_cast<int>(lanes));
  for (int64_t j = seen.begin / kKeyTile * kKeyTile; j < seen.end; j += kKeyTile) {
    const int64_t keys = least(kKeyTile, sequence.len_k - j);
    if (ask(tile, 0, static_cast<int>(lanes), {j, j + keys}) == TileKind::kSkip) continue;
    const int64_t key_row = sequence.key_begin + j, padded = round_up(keys, 8);
    load_tile(rows_of(p.k, p.dtype, sequence, kv_head, key_row), keys, padded, p.head_dim,
              scratch.k, head_words);
    load_tile(rows_of(p.v, p.dtype, sequence, kv_head, key_row), keys, padded, p.value_dim,
              scratch.v_rows, p.value_dim / kPack);
    if (kPack == 2) {
      pair_rows(scratch.v_rows, padded, p.value_dim, p.value_dim / kPack, scratch.v, p.value_dim);
    }
    if (dropout.threshold > 0) draw_tile(dropout, j, keys, begin, lanes, scratch.draws);
    for (int64_t lane = 0; lane < lanes;) {
      const int64_t vecs = column_vecs((lanes - lane) / kLanes);
      forward_panel(p, dropout, j, j + keys, lane, vecs, scale_log2, scratch);
      lane += vecs * kLanes;
    }
  }
  finish_tile(p, sequence, head, rows, scale_log2, dropout.keep_scale(), scratch);
}

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
