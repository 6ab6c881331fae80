// The kernels that exist, each compiled in a file of its own under instances/. launch_forward.cu
// and launch_backward.cu choose among them; nothing else is instantiated.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/launch.h"

namespace jax_flash::attention {

// bf16 and fp16 on tensor cores; kHeadDim is max(head_dim, value_dim) rounded up to 32, 64, 96,
// 128, 192 or 256 (forward), 64, 128 or 256 (backward).
template <typename Element, int kHeadDim>
const char* forward_sm80(const ForwardParams& params, cudaStream_t stream);
template <typename Element, int kHeadDim>
const char* backward_sm80(const BackwardParams& params, cudaStream_t stream);

// The same on Hopper (sm_90a), or kNotCovered (architecture.h). The forward's head dims are 64, 96,
// 128, 192 and 256, or 192 with a kValueDim of 128; the backward's as above.
template <typename Element, int kHeadDim, int kValueDim>
const char* forward_sm90(const ForwardParams& params, cudaStream_t stream);
template <typename Element, int kHeadDim, bool kHasDropout>
const char* backward_sm90(const BackwardParams& params, cudaStream_t stream);

// f32 in exact f32 arithmetic; the head dims of the backward.
template <int kHeadDim>
const char* forward_f32(const ForwardParams& params, cudaStream_t stream);
template <int kHeadDim>
const char* backward_f32(const BackwardParams& params, cudaStream_t stream);

// Calls run<dim>() with the smallest template head dim that holds both of the problem's.
template <typename Run>
const char* with_head_dim(const Problem& p, Run&& run) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 32) return run.template operator()<32>();
  if (dim <= 64) return run.template operator()<64>();
  if (dim <= 96) return run.template operator()<96>();
  if (dim <= 128) return run.template operator()<128>();
  if (dim <= 192) return run.template operator()<192>();
  if (dim <= 256) return run.template operator()<256>();
  return "jax_flash: head_dim: expected at most 256";
}

// The same for the backward and for f32, which have fewer.
template <typename Run>
const char* with_coarse_head_dim(const Problem& p, Run&& run) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return run.template operator()<64>();
  if (dim <= 128) return run.template operator()<128>();
  if (dim <= 256) return run.template operator()<256>();
  return "jax_flash: head_dim: expected at most 256";
}

// nullptr, or why a launch failed.
inline const char* launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jax_flash::attention
