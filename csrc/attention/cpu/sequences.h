// Lengths and cu_seqlens -> the list of independent attention problems of a call, clamped so that
// no value an array may hold leads out of bounds, and the rows that belong to none of them.
#pragma once

#include <vector>

#include "attention/params.h"

namespace jax_flash::attention::cpu {

// One sequence of one batch entry. Rows are counted in the arrays, i and j from the sequence's
// start.
struct Sequence {
  int64_t batch[kBatchDims];
  int64_t entry;  // the batch entry, flattened
  int64_t index;  // the sequence within its batch entry
  int64_t query_begin, key_begin;
  int64_t len_q, len_k;
  int64_t diagonal;  // query i is aligned with key i + diagonal
};

// Rows [begin, end) of one batch entry that no sequence owns: outputs must be filled there.
struct Gap {
  int64_t batch[kBatchDims];
  int64_t begin, end;
};

struct Sequences {
  std::vector<Sequence> list;
  std::vector<Gap> query_gaps, key_gaps;
};

Sequences find_sequences(const Problem& p);

}  // namespace jax_flash::attention::cpu
