// The few functions of cuBLASLt that we call, and where to find them: in the library that JAX has
// loaded already. Nothing links or includes cuBLASLt: building needs no part of it, and a machine
// without it still imports the module. Numbers and layouts are those of its binary interface
// (cublasLt.h of CUDA 12 and 13, which are alike here).
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace jax_flash::dense::cublaslt {

using Handle = struct HandleTag*;
using Description = struct DescriptionTag*;
using Layout = struct LayoutTag*;
using Preference = struct PreferenceTag*;
using Status = int;  // 0 is success

enum DataType : int32_t { kFloat = 0, kHalf = 2, kBFloat16 = 14 };  // cudaDataType_t
inline constexpr int kComputeFloat = 68;                            // CUBLAS_COMPUTE_32F

enum Epilogue : int32_t {
  kGeluAux = 32 | 128,
  kGelu = 32,
  kGeluBias = 32 | 4,
  kGeluAuxBias = 32 | 128 | 4,
  kGeluGradient = 64 | 128,
};

enum DescriptionAttribute : int {
  kTransposeA = 3,
  kEpilogue = 7,
  kBiasPointer = 8,
  kAuxPointer = 11,
  kAuxLeadingDimension = 12,
  kBiasType = 26,
};
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kMinAlignmentA = 5,
  kMinAlignmentB = 6,
  kMinAlignmentC = 7,
  kMinAlignmentD = 8,
};
enum AlgorithmAttribute : int { kTile = 1, kClusterShape = 8 };  // uint32_t, uint16_t
inline constexpr uint32_t kTile128x128 = 20, kTile128x160 = 29;
inline constexpr uint16_t kCluster2x1 = 3, kCluster1x2 = 5;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);

struct Library {
  Status (*create)(Handle*);
  Status (*description_create)(Description*, int compute, int32_t scale_type);
  Status (*description_set)(Description, int attribute, const void*, size_t bytes);
  Status (*description_destroy)(Description);
  Status (*layout_create)(Layout*, int32_t type, uint64_t rows, uint64_t columns, int64_t stride);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_set)(Preference, int attribute, const void*, size_t bytes);
  Status (*preference_destroy)(Preference);
  Status (*heuristics)(Handle, Description, Layout a, Layout b, Layout c, Layout d, Preference,
                       int wanted, Heuristic*, int* found);
  Status (*algorithm_get)(const Algorithm*, int attribute, void*, size_t bytes, size_t* written);
  Status (*matmul)(Handle, Description, const void* alpha, const void* a, Layout, const void* b,
                   Layout, const void* beta, const void* c, Layout, void* d, Layout,
                   const Algorithm*, void* workspace, size_t bytes, cudaStream_t);
};

// All functions, or nullptr where the library or one of them is missing.
inline const Library* library() {
  static Library functions;
  static const bool is_complete = [] {
    void* file = nullptr;
    for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {  // the one JAX has; any other
      for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
        if (file == nullptr) file = dlopen(name, flags);
      }
    }
    if (file == nullptr) return false;
    bool found = true;
    const auto find = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, name));
      found = found && function != nullptr;
    };
    find("cublasLtCreate", functions.create);
    find("cublasLtMatmulDescCreate", functions.description_create);
    find("cublasLtMatmulDescSetAttribute", functions.description_set);
    find("cublasLtMatmulDescDestroy", functions.description_destroy);
    find("cublasLtMatrixLayoutCreate", functions.layout_create);
    find("cublasLtMatrixLayoutDestroy", functions.layout_destroy);
    find("cublasLtMatmulPreferenceCreate", functions.preference_create);
    find("cublasLtMatmulPreferenceSetAttribute", functions.preference_set);
    find("cublasLtMatmulPreferenceDestroy", functions.preference_destroy);
    find("cublasLtMatmulAlgoGetHeuristic", functions.heuristics);
    find("cublasLtMatmulAlgoConfigGetAttribute", functions.algorithm_get);
    find("cublasLtMatmul", functions.matmul);
    return found;
  }();
  return is_complete ? &functions : nullptr;
}

}  // namespace jax_flash::dense::cublaslt
