// One variant of the sm_90a attention kernels behind a C function, without XLA: what
// `python -m benchmarks.variants build` compiles, for one direction and one head dim
// (VARIANT_BACKWARD, VARIANT_HEAD_DIM). All arrays are [batch, rows, heads, head_dim], contiguous.
#include <cmath>

#ifdef VARIANT_BACKWARD
#include "attention/cuda/sm90/backward_launch.cuh"
#else
#include "attention/cuda/sm90/forward_launch.cuh"
#endif

namespace jax_flash::attention::variants {

// The same, field by field, as Call in __main__.py.
struct Call {
  void *q, *k, *v, *o, *dout, *dq, *dk, *dv;
  float* lse;  // [batch, heads, seq_q]
  void* workspace;
  int64_t workspace_bytes;
  int64_t batch, seq_q, seq_k, heads, kv_heads, head_dim;
  int64_t causal;       // 0: no; 1: top left; 2: bottom right
  int64_t window_left;  // negative: none
  int64_t is_fp16, deterministic;
  int64_t num_sequences;  // 0: dense
  const int32_t* cu_seqlens;
  int64_t threshold;         // of dropout; 0: none
  const uint32_t* state;     // [batch, 4]: of DropoutParams
  const uint32_t* head_ids;  // [heads]
};

template <typename Void>
View<Void> view(void* data, int64_t rows, int64_t heads, int64_t dim) {
  View<Void> x;
  x.data = data;
  x.batch.stride[2] = rows * heads * dim;
  x.row_stride = heads * dim;
  x.head_stride = dim;
  return x;
}

template <typename Float>
RowView<Float> rows_of(float* data, int64_t rows, int64_t heads) {
  RowView<Float> x;
  x.data = data;
  x.batch.stride[2] = rows * heads;
  x.head_stride = rows;
  return x;
}

template <typename Params>
Params params_of(const Call& c) {
  Params p;
  p.dtype = c.is_fp16 ? jax_flash::DType::kF16 : jax_flash::DType::kBF16;
  p.batch_shape[2] = c.batch;
  p.seq_q = c.seq_q;
  p.seq_k = c.seq_k;
  p.heads = c.heads;
  p.kv_heads = c.kv_heads;
  p.head_dim = p.value_dim = c.head_dim;
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.head_dim)));
  if (c.causal != 0) p.mask.window_right = 0;
  p.mask.bottom_right = c.causal == 2;
  if (c.window_left >= 0) p.mask.window_left = c.window_left;
  if (c.num_sequences > 0) {
    p.mask.varlen = true;
    p.num_sequences = c.num_sequences;
    p.mask.query_lengths.data = p.mask.key_lengths.data = c.cu_seqlens;
  }
  p.dropout.threshold = static_cast<uint32_t>(c.threshold);
  p.dropout.state.data = c.state;
  p.dropout.state.batch.stride[2] = 4;
  p.dropout.head_ids = c.head_ids;
  p.q = view<const void>(c.q, c.seq_q, c.heads, c.head_dim);
  p.k = view<const void>(c.k, c.seq_k, c.kv_heads, c.head_dim);
  p.v = view<const void>(c.v, c.seq_k, c.kv_heads, c.head_dim);
  return p;
}

#ifdef VARIANT_BACKWARD
template <typename Element>
const char* run_as(const Call& c, cudaStream_t stream) {
  auto p = params_of<BackwardParams>(c);
  p.o = view<const void>(c.o, c.seq_q, c.heads, c.head_dim);
  p.dout = view<const void>(c.dout, c.seq_q, c.heads, c.head_dim);
  p.lse = rows_of<const float>(c.lse, c.seq_q, c.heads);
  p.dq = view<void>(c.dq, c.seq_q, c.heads, c.head_dim);
  p.dk = view<void>(c.dk, c.seq_k, c.kv_heads, c.head_dim);
  p.dv = view<void>(c.dv, c.seq_k, c.kv_heads, c.head_dim);
  p.workspace = c.workspace;
  p.workspace_bytes = c.workspace_bytes;
  p.deterministic = c.deterministic != 0;
  const auto run = c.threshold > 0 ? sm90::choose_backward<Element, VARIANT_HEAD_DIM, true>
                                   : sm90::choose_backward<Element, VARIANT_HEAD_DIM, false>;
  return run(p, stream);
}
#else
template <typename Element>
const char* run_as(const Call& c, cudaStream_t stream) {
  auto p = params_of<ForwardParams>(c);
  p.o = view<void>(c.o, c.seq_q, c.heads, c.head_dim);
  p.lse = rows_of<float>(c.lse, c.seq_q, c.heads);
  return forward_sm90<Element, VARIANT_HEAD_DIM, VARIANT_HEAD_DIM>(p, stream);
}
#endif

}  // namespace jax_flash::attention::variants

using namespace jax_flash::attention::variants;

extern "C" int call_bytes() { return sizeof(Call); }

// What a process without torch needs of the runtime (sanitize.py): a copy on the device, or without
// `host` an allocation alone; nullptr if there is no room.
extern "C" void* to_device(const void* host, int64_t bytes) {
  void* data = nullptr;
  if (cudaMalloc(&data, bytes) != cudaSuccess) return nullptr;
  if (host != nullptr) cudaMemcpy(data, host, bytes, cudaMemcpyHostToDevice);
  return data;
}

extern "C" const char* to_host(void* host, void* data, int64_t bytes) {
  const cudaError_t error = cudaMemcpy(host, data, bytes, cudaMemcpyDeviceToHost);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

extern "C" void release(void* data) { cudaFree(data); }

// nullptr, or why it could not be launched.
extern "C" const char* run(const Call* call, cudaStream_t stream) {
#ifdef VARIANT_FP16
  if (call->is_fp16) return run_as<__half>(*call, stream);
#endif
  return call->is_fp16 ? "built without fp16" : run_as<__nv_bfloat16>(*call, stream);
}
