// Run-time types -> the kernel of both directions, once, where rows are long; else two kernels.
#include "cross_entropy/cuda/gradients.cuh"
#include "cross_entropy/cuda/shape.h"
#include "cross_entropy/launch.h"

namespace jax_flash::cross_entropy {
namespace {

template <typename Result, bool kTotal, int kThreads, int kBlocks>
void launch_rows(const ForwardParams& f, const BackwardParams& b, cudaStream_t stream) {
  gradients_kernel<Result, kTotal, kThreads, 4, kBlocks>
      <<<static_cast<unsigned>(f.rows), kThreads, 0, stream>>>(f, b);
}

// On an H200, microseconds of 512 threads, two blocks an SM, for 1024: 2048 x 32000 127 for 126,
// 4096 x 16384 122 for 167, 1024 x 50304 119 for 112.
template <typename Result, bool kTotal>
void launch(const ForwardParams& f, const BackwardParams& b, cudaStream_t stream) {
  row_bytes(f) <= 96 << 10 ? launch_rows<Result, kTotal, 512, 2>(f, b, stream)
                           : launch_rows<Result, kTotal, 1024, 1>(f, b, stream);
}

}  // namespace

const char* launch_gradients(const ForwardParams& f, const BackwardParams& b, cudaStream_t stream) {
  if (f.rows == 0) return nullptr;
  if (f.dtype != DType::kF32 || f.scale < 0 || row_bytes(f) < 32 << 10) {
    if (const char* error = launch_forward(f, stream)) return error;
    return launch_backward(b, stream);
  }
  device::visit(b.result, [&]<typename Result>() {
    f.total == nullptr ? launch<Result, false>(f, b, stream) : launch<Result, true>(f, b, stream);
  });
  return last_error();
}

}  // namespace jax_flash::cross_entropy
