#include "attention/cpu/sequences.h"

#include <algorithm>

namespace jax_flash::attention::cpu {
namespace {

template <typename T>
const T* entry_of(const PerBatch<T>& option, const int64_t (&batch)[kBatchDims]) {
  const T* data = option.data;
  for (int axis = 0; data != nullptr && axis < kBatchDims; ++axis) {
    data += batch[axis] * option.batch.stride[axis];
  }
  return data;
}

// The boundaries of the sequences: [0, length] in the dense form; cu_seqlens clamped to [0, rows]
// and made monotonic by a running maximum in the varlen form.
std::vector<int64_t> boundaries(const int32_t* lengths, bool varlen, int64_t num_sequences,
                                int64_t rows) {
  const auto clamp = [rows](int64_t x) { return std::clamp<int64_t>(x, 0, rows); };
  if (!varlen) return {0, lengths != nullptr ? clamp(lengths[0]) : rows};
  std::vector<int64_t> bounds(num_sequences + 1);
  int64_t reached = 0;
  for (int64_t s = 0; s <= num_sequences; ++s) {
    reached = std::max(reached, clamp(lengths[s]));
    bounds[s] = reached;
  }
  return bounds;
}

void add_gaps(const int64_t (&batch)[kBatchDims], const std::vector<int64_t>& bounds, int64_t rows,
              std::vector<Gap>& gaps) {
  if (bounds.front() > 0) gaps.push_back({{batch[0], batch[1], batch[2]}, 0, bounds.front()});
  if (bounds.back() < rows) gaps.push_back({{batch[0], batch[1], batch[2]}, bounds.back(), rows});
}

}  // namespace

Sequences find_sequences(const Problem& p) {
  Sequences found;
  const MaskParams& mask = p.mask;
  int64_t entry = 0;
  int64_t batch[kBatchDims];
  for (batch[0] = 0; batch[0] < p.batch_shape[0]; ++batch[0]) {
    for (batch[1] = 0; batch[1] < p.batch_shape[1]; ++batch[1]) {
      for (batch[2] = 0; batch[2] < p.batch_shape[2]; ++batch[2], ++entry) {
        const auto q =
            boundaries(entry_of(mask.query_lengths, batch), mask.varlen, p.num_sequences, p.seq_q);
        const auto k =
            boundaries(entry_of(mask.key_lengths, batch), mask.varlen, p.num_sequences, p.seq_k);
        const int32_t* offset = entry_of(mask.causal_offset, batch);
        for (size_t s = 0; s + 1 < q.size(); ++s) {
          Sequence sequence = {{batch[0], batch[1], batch[2]},
                               entry,
                               int64_t(s),
                               q[s],
                               k[s],
                               q[s + 1] - q[s],
                               k[s + 1] - k[s],
                               0};
          sequence.diagonal = (offset != nullptr ? offset[0] : 0) +
                              (mask.bottom_right ? sequence.len_k - sequence.len_q : 0);
          found.list.push_back(sequence);
        }
        add_gaps(batch, q, p.seq_q, found.query_gaps);
        add_gaps(batch, k, p.seq_k, found.key_gaps);
      }
    }
  }
  return found;
}

}  // namespace jax_flash::attention::cpu
