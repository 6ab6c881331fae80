#include "testing/ptx/wgmma.cuh"

namespace jax_flash::testing {

const char* launch_wgmma_bf16(const WgmmaProblem& p, cudaStream_t stream) {
  return launch_wgmma<__nv_bfloat16>(p, stream);
}

}  // namespace jax_flash::testing
