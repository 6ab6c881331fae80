// Run-time dtype -> the forward kernel, once.
#include "cross_entropy/cuda/forward.cuh"
#include "cross_entropy/cuda/shape.h"
#include "cross_entropy/launch.h"

namespace jax_flash::cross_entropy {
namespace {

template <typename Element, bool kTotal, bool kNegativeScale, int kThreads, int kUnroll,
          int kBlocks>
void launch_rows(const ForwardParams& p, cudaStream_t stream) {
  const LaunchShape<kThreads> shape(p.rows);
  forward_kernel<Element, kTotal, kNegativeScale, kThreads, kUnroll, kBlocks>
      <<<shape.blocks, shape.threads, 0, stream>>>(p);
}

// A warp a row up to 16 KiB: on an H200 4340 GB/s for 4200 there, 4240 for 4420 at 32 KiB.
template <typename Element, bool kTotal, bool kNegativeScale>
void launch(const ForwardParams& p, cudaStream_t stream) {
  if (row_bytes(p) <= 512) {
    launch_rows<Element, kTotal, kNegativeScale, 8, 2, 4>(p, stream);
  } else if (row_bytes(p) <= 16 << 10) {
    launch_rows<Element, kTotal, kNegativeScale, 32, 2, 4>(p, stream);
  } else {
    launch_rows<Element, kTotal, kNegativeScale, 128, 4, 8>(p, stream);
  }
}

template <typename Element, bool kTotal>
void launch_signed(const ForwardParams& p, cudaStream_t stream) {
  p.scale < 0 ? launch<Element, kTotal, true>(p, stream)
              : launch<Element, kTotal, false>(p, stream);
}

}  // namespace

const char* launch_forward(const ForwardParams& p, cudaStream_t stream) {
  if (p.rows == 0) return nullptr;
  device::visit(p.dtype, [&]<typename Element>() {
    p.total == nullptr ? launch_signed<Element, false>(p, stream)
                       : launch_signed<Element, true>(p, stream);
  });
  return last_error();
}

}  // namespace jax_flash::cross_entropy
