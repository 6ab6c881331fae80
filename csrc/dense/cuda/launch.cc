// One product through cuBLASLt. It counts in columns: our row-major [rows, outputs] is its
// [outputs, rows], so the weight is its A and x its B, and the bias runs along its rows.
//
//   out^T [outputs, rows] = op(W) [outputs, inputs] * x^T [inputs, rows]
//
// Which algorithm serves a shape is asked once and kept; the rest is made anew for each call, a
// few microseconds of the host.
#include "dense/launch.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>

#include "dense/cuda/cublaslt.h"

namespace jax_flash::dense {
namespace {

using namespace cublaslt;

constexpr int kMaxHeuristics = 8;

// What an algorithm is chosen by.
using Key = std::array<int64_t, 11>;

// Destroys a cuBLASLt object when its scope ends.
template <typename T>
struct Owner {
  explicit Owner(Status (*destroy)(T)) : destroy(destroy) {}
  ~Owner() {
    if (object != nullptr) destroy(object);
  }
  Owner(const Owner&) = delete;
  Owner& operator=(const Owner&) = delete;

  T object = nullptr;
  Status (*destroy)(T);
};

Epilogue epilogue_of(const Params& p) {
  if (!p.is_forward) return kGeluGradient;
  if (p.pre != nullptr) return p.bias != nullptr ? kGeluAuxBias : kGeluAux;
  return p.bias != nullptr ? kGeluBias : kGelu;
}

// The largest power of two, up to 256, that divides an address (null: 256).
uint32_t alignment_of(const void* data) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data) | 256;
  return static_cast<uint32_t>(address & -address);
}

// Description and layouts of one call.
struct Product {
  explicit Product(const Library& lt)
      : lt(lt),
        description(lt.description_destroy),
        a(lt.layout_destroy),
        b(lt.layout_destroy),
        d(lt.layout_destroy) {}

  bool describe(const Params& p) {
    const DataType type = p.dtype == DType::kF16 ? kHalf : kBFloat16;
    const int64_t stride_a = p.is_forward ? p.outputs : p.inputs;
    const int64_t columns_a = p.is_forward ? p.inputs : p.outputs;
    bool ok = lt.description_create(&description.object, kComputeFloat, kFloat) == 0 &&
              lt.layout_create(&a.object, type, stride_a, columns_a, stride_a) == 0 &&
              lt.layout_create(&b.object, type, p.inputs, p.rows, p.inputs) == 0 &&
              lt.layout_create(&d.object, type, p.outputs, p.rows, p.outputs) == 0;
    ok = ok && set(kEpilogue, static_cast<int32_t>(epilogue_of(p)));
    if (!p.is_forward) ok = ok && set(kTransposeA, int32_t{1});
    if (p.bias != nullptr) {
      ok = ok && set(kBiasPointer, p.bias) && set(kBiasType, static_cast<int32_t>(type));
    }
    if (p.pre != nullptr)
      ok = ok && set(kAuxPointer, p.pre) && set(kAuxLeadingDimension, p.outputs);
    return ok;
  }

  template <typename T>
  bool set(DescriptionAttribute attribute, T value) {
    return lt.description_set(description.object, attribute, &value, sizeof(value)) == 0;
  }

  const Library& lt;
  Owner<Description> description;
  Owner<Layout> a, b, d;
};

// How early a suggestion of cuBLASLt should be tried, for a kind of product whose first one is
// slow; kNever: not before the first one. Of all eight at ten shapes on an H200 (2026-11-28,
// docs/kernels/dense.md) these are the fastest, or within 4% of it, and the first ones up to 1.3
// times slower.
constexpr int kNever = 2;

int rank(const Library& lt, const Algorithm& algorithm, const Params& p) {
  const auto get = [&](AlgorithmAttribute attribute, auto value) {
    size_t written = 0;
    lt.algorithm_get(&algorithm, attribute, &value, sizeof(value), &written);
    return value;
  };
  if (!p.is_forward) {
    if (p.rows < 2048) return kNever;  // 512 rows: the first one, by 1.2
    const uint16_t cluster = get(kClusterShape, uint16_t{0});
    return cluster == kCluster1x2 || cluster == kCluster2x1 ? 0 : kNever;
  }
  if (p.pre != nullptr) return kNever;
  const uint32_t tile = get(kTile, uint32_t{0});
  return tile == kTile128x128 ? 0 : tile == kTile128x160 ? 1 : kNever;
}

bool choose(const Library& lt, Handle handle, const Product& product, const Params& p,
            Algorithm& chosen) {
  Owner<Preference> preference(lt.preference_destroy);
  if (lt.preference_create(&preference.object) != 0) return false;
  const auto prefer = [&](PreferenceAttribute attribute, auto value) {
    return lt.preference_set(preference.object, attribute, &value, sizeof(value)) == 0;
  };
  const uint32_t alignment_d = std::min(alignment_of(p.out), alignment_of(p.pre));
  if (!prefer(kMaxWorkspaceBytes, static_cast<uint64_t>(p.workspace_bytes)) ||
      !prefer(kMinAlignmentA, alignment_of(p.weight)) ||
      !prefer(kMinAlignmentB, alignment_of(p.x)) || !prefer(kMinAlignmentC, alignment_d) ||
      !prefer(kMinAlignmentD, alignment_d)) {
    return false;
  }
  Heuristic found[kMaxHeuristics];
  int count = 0;
  const Status status = lt.heuristics(handle, product.description.object, product.a.object,
                                      product.b.object, product.d.object, product.d.object,
                                      preference.object, kMaxHeuristics, found, &count);
  if (status != 0 || count == 0) return false;
  int best = 0, best_rank = kNever;
  for (int i = 0; i < count; ++i) {
    const int own = rank(lt, found[i].algorithm, p);
    if (own < best_rank) best = i, best_rank = own;
  }
  chosen = found[best].algorithm;
  return true;
}

// The handle of each device and the algorithm of each shape, for as long as the process lives.
struct Cache {
  std::mutex mutex;
  std::map<int, Handle> handles;
  std::map<Key, Algorithm> algorithms;
};

Cache& cache() {
  static Cache* const all = new Cache;  // never destroyed: cuBLASLt may be gone by then
  return *all;
}

const char* find(const Library& lt, const Product& product, const Params& p, Handle& handle,
                 Algorithm& algorithm) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return "jax_flash: no current CUDA device";
  const Key key = {device,
                   static_cast<int64_t>(p.dtype),
                   epilogue_of(p),
                   p.rows,
                   p.inputs,
                   p.outputs,
                   p.workspace_bytes,
                   alignment_of(p.x),
                   alignment_of(p.weight),
                   alignment_of(p.out),
                   alignment_of(p.pre)};
  Cache& all = cache();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Handle& own = all.handles[device];
  if (own == nullptr && lt.create(&own) != 0) return "jax_flash: cublasLtCreate failed";
  handle = own;
  if (const auto known = all.algorithms.find(key); known != all.algorithms.end()) {
    algorithm = known->second;
    return nullptr;
  }
  if (!choose(lt, handle, product, p, algorithm)) {
    return "jax_flash: cuBLASLt has no algorithm for this product (implementation=\"xla\" has)";
  }
  all.algorithms[key] = algorithm;
  return nullptr;
}

}  // namespace

const char* launch_product(const Params& p, cudaStream_t stream) {
  const Library* const lt = library();
  if (lt == nullptr) return "jax_flash: no libcublasLt.so of CUDA 12 or 13 in this process";
  Product product(*lt);
  if (!product.describe(p)) return "jax_flash: cuBLASLt refused to describe a product";
  Handle handle;
  Algorithm algorithm;
  if (const char* error = find(*lt, product, p, handle, algorithm)) return error;
  const float one = 1.0f, zero = 0.0f;
  const Status status =
      lt->matmul(handle, product.description.object, &one, p.weight, product.a.object, p.x,
                 product.b.object, &zero, p.out, product.d.object, p.out, product.d.object,
                 &algorithm, p.workspace, static_cast<size_t>(p.workspace_bytes), stream);
  return status == 0 ? nullptr : "jax_flash: cublasLtMatmul failed";
}

}  // namespace jax_flash::dense
