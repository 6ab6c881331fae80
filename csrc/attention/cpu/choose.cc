// Which instruction set serves a call.
#include <cstdlib>

#include "attention/cpu/kernels.h"

namespace jax_flash::attention::cpu {
namespace {

enum Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kNumLevels };
constexpr const char* kNames[kNumLevels] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Level best_level() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (has_avx2) return kAvx2;
#endif
  return kBaseline;
}

}  // namespace

const Kernels* choose_kernels(DType dtype, std::string& problem) {
  static const Level best = best_level();
  Level level = best;
  // Read at every call, so that a test may set it after the module was loaded.
  if (const char* wanted = std::getenv("JAX_FLASH_CPU_ISA"); wanted != nullptr && *wanted != 0) {
    int found = 0;
    while (found < kNumLevels && std::string(wanted) != kNames[found]) ++found;
    if (found == kNumLevels || found > best) {
      problem = "jax_flash: JAX_FLASH_CPU_ISA: expected ";
      for (int i = 0; i <= best; ++i) problem += std::string(i > 0 ? " or " : "") + kNames[i];
      problem += " on this CPU, got " + std::string(wanted);
      return nullptr;
    }
    level = static_cast<Level>(found);
  }
#if defined(__x86_64__)
  switch (level) {
    case kAvx512Bf16:
      // The dot instructions take bfloat16 alone.
      return dtype == DType::kBF16 ? &avx512_bf16::kKernels : &avx512::kKernels;
    case kAvx512:
      return &avx512::kKernels;
    case kAvx2:
      return &avx2::kKernels;
    default:
      break;
  }
#endif
  return &baseline::kKernels;
}

}  // namespace jax_flash::attention::cpu
