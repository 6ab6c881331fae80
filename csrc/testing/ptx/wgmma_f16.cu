#include "testing/ptx/wgmma.cuh"

namespace jax_flash::testing {

const char* launch_wgmma_f16(const WgmmaProblem& p, cudaStream_t stream) {
  return launch_wgmma<__half>(p, stream);
}

}  // namespace jax_flash::testing
