// The extension module jax_flash._cuda_testing: custom calls that run each primitive of csrc/ptx
// alone (launch.h says what each computes). For tests/test_ptx.py; no part of the package.
#include "xla/ffi/api/ffi.h"

#include <nanobind/nanobind.h>

#include <algorithm>

#include "common/error.h"
#include "testing/ptx/launch.h"

namespace jax_flash::testing {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U16 = ffi::Buffer<ffi::U16>;
using U32 = ffi::Buffer<ffi::U32>;

ffi::Error to_error(const char* message) {
  return message == nullptr ? ffi::Error::Success() : ffi::Error::Internal(message);
}

int dim(ffi::Span<const int64_t> dims, size_t axis) { return static_cast<int>(dims[axis]); }

ffi::Error wgmma(cudaStream_t stream, U16 a, U16 b, F32 c, ffi::Result<F32> d, bool is_bf16,
                 bool a_in_registers, bool transpose_a, bool transpose_b, bool accumulate,
                 int64_t first_byte) {
  const int n = dim(c.dimensions(), 1), depth = dim(a.dimensions(), transpose_a ? 0 : 1);
  if (dim(c.dimensions(), 0) != 128 || depth % 128 != 0 || first_byte % 1024 != 0 ||
      a.element_count() != size_t{128} * depth || b.element_count() != size_t(n) * depth ||
      d->element_count() != c.element_count()) {
    return bad_argument("a", "[128, depth] and [n, depth], depth a multiple of 128",
                        to_string(a.dimensions()));
  }
  const WgmmaProblem p{a_in_registers,
                       transpose_a,
                       transpose_b,
                       accumulate,
                       n,
                       depth,
                       static_cast<int>(first_byte),
                       a.typed_data(),
                       b.typed_data(),
                       c.typed_data(),
                       d->typed_data()};
  return to_error(is_bf16 ? launch_wgmma_bf16(p, stream) : launch_wgmma_f16(p, stream));
}

ffi::Error tma_load(cudaStream_t stream, U16 source, S32 coordinates, ffi::Result<U16> out,
                    ffi::Span<const int64_t> sizes, ffi::Span<const int64_t> strides,
                    int64_t hint) {
  if (sizes.size() != 4 || strides.size() != 3) return bad_argument("sizes", 4, sizes.size());
  int64_t size[4], stride[3];
  std::copy(sizes.begin(), sizes.end(), size);
  std::copy(strides.begin(), strides.end(), stride);
  return to_error(launch_tma_load(source.typed_data(), size, stride, dim(out->dimensions(), 1),
                                  static_cast<int>(hint), coordinates.typed_data(),
                                  dim(out->dimensions(), 0), out->typed_data(), stream));
}

// `out` is the memory of the third argument: what no box meets stays.
ffi::Error tma_store(cudaStream_t stream, U16 source, S32 coordinates, U16 before,
                     ffi::Result<U16> out, ffi::Span<const int64_t> sizes,
                     ffi::Span<const int64_t> strides) {
  if (sizes.size() != 4 || strides.size() != 3) return bad_argument("sizes", 4, sizes.size());
  if (before.typed_data() != out->typed_data()) {
    return bad_argument("out", "the memory of `before`", "memory of its own");
  }
  int64_t size[4], stride[3];
  std::copy(sizes.begin(), sizes.end(), size);
  std::copy(strides.begin(), strides.end(), stride);
  return to_error(launch_tma_store(source.typed_data(), size, stride, dim(source.dimensions(), 1),
                                   coordinates.typed_data(), dim(source.dimensions(), 0),
                                   out->typed_data(), stream));
}

ffi::Error pipeline(cudaStream_t stream, F32 source, ffi::Result<F32> sums, int64_t delay) {
  return to_error(launch_pipeline(source.typed_data(), dim(source.dimensions(), 0),
                                  static_cast<int>(delay), sums->typed_data(), stream));
}

// `total` is the memory of the third argument: what is there before counts.
ffi::Error bulk_reduce(cudaStream_t stream, F32 source, F32 before, ffi::Result<F32> total) {
  if (before.typed_data() != total->typed_data()) {
    return bad_argument("total", "the memory of `before`", "memory of its own");
  }
  const auto dims = source.dimensions();
  return to_error(launch_bulk_reduce(source.typed_data(), dim(dims, 0), dim(dims, 1), dim(dims, 2),
                                     total->typed_data(), stream));
}

ffi::Error own_sum(cudaStream_t stream, F32 source, ffi::Result<F32> sums, ffi::Result<F32> out) {
  const auto dims = source.dimensions();
  return to_error(launch_own_sum(source.typed_data(), dim(dims, 0), dim(dims, 1),
                                 sums->typed_data(), out->typed_data(), stream));
}

ffi::Error stmatrix(cudaStream_t stream, U32 fragments, ffi::Result<U16> matrix,
                    ffi::Result<U32> back, bool transpose) {
  return to_error(launch_stmatrix(fragments.typed_data(), transpose, matrix->typed_data(),
                                  back->typed_data(), stream));
}

ffi::Error named_barriers(cudaStream_t stream, ffi::Result<S32> order) {
  return to_error(
      launch_named_barriers(dim(order->dimensions(), 0) / 3, order->typed_data(), stream));
}

ffi::Error dependent_pair(cudaStream_t stream, F32 source, ffi::Result<F32> out,
                          ffi::Result<F32> scratch, ffi::Result<S32> seen) {
  return to_error(launch_dependent_pair(source.typed_data(), dim(source.dimensions(), 0),
                                        scratch->typed_data(), out->typed_data(),
                                        seen->typed_data(), stream));
}

ffi::Error ordered_sum(cudaStream_t stream, F32 source, ffi::Result<F32> total,
                       ffi::Result<S32> turn) {
  return to_error(launch_ordered_sum(source.typed_data(), dim(source.dimensions(), 0),
                                     dim(source.dimensions(), 1), total->typed_data(),
                                     turn->typed_data(), stream));
}

ffi::Error claimed_sum(cudaStream_t stream, F32 source, ffi::Result<F32> total,
                       ffi::Result<S32> states) {
  return to_error(launch_claimed_sum(source.typed_data(), dim(source.dimensions(), 0),
                                     dim(source.dimensions(), 1), dim(total->dimensions(), 0),
                                     total->typed_data(), states->typed_data(), stream));
}

ffi::Error repeated_rows(cudaStream_t stream, U16 a, U16 b, ffi::Result<F32> d) {
  const int n = dim(b.dimensions(), 1);
  if (a.element_count() != 64 || b.element_count() != size_t{8} * n ||
      d->element_count() != size_t{64} * n) {
    return bad_argument("b", "[8, n], with a of [8, 8]", to_string(b.dimensions()));
  }
  return to_error(launch_repeated_rows(a.typed_data(), b.typed_data(), n, d->typed_data(), stream));
}

ffi::Error cluster(cudaStream_t stream, U32 source, U32 constant, ffi::Result<U32> out) {
  const auto dims = source.dimensions();
  if (dims.size() != 3 || dims[2] != 512 || constant.element_count() != 4 ||
      out->element_count() != source.element_count()) {
    return bad_argument("source", "[pairs, rows, 512]", to_string(dims));
  }
  return to_error(launch_cluster(source.typed_data(), constant.typed_data(), dim(dims, 0),
                                 dim(dims, 1), out->typed_data(), stream));
}

auto bind() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

XLA_FFI_DEFINE_HANDLER(Wgmma, wgmma,
                       bind()
                           .Arg<U16>()  // a
                           .Arg<U16>()  // b
                           .Arg<F32>()  // c
                           .Ret<F32>()  // d
                           .Attr<bool>("is_bf16")
                           .Attr<bool>("a_in_registers")
                           .Attr<bool>("transpose_a")
                           .Attr<bool>("transpose_b")
                           .Attr<bool>("accumulate")
                           .Attr<int64_t>("first_byte"));
XLA_FFI_DEFINE_HANDLER(TmaLoad, tma_load,
                       bind()
                           .Arg<U16>()  // source
                           .Arg<S32>()  // coordinates
                           .Ret<U16>()  // out
                           .Attr<ffi::Span<const int64_t>>("sizes")
                           .Attr<ffi::Span<const int64_t>>("strides")
                           .Attr<int64_t>("hint"));
XLA_FFI_DEFINE_HANDLER(TmaStore, tma_store,
                       bind()
                           .Arg<U16>()  // source
                           .Arg<S32>()  // coordinates
                           .Arg<U16>()  // before
                           .Ret<U16>()  // out
                           .Attr<ffi::Span<const int64_t>>("sizes")
                           .Attr<ffi::Span<const int64_t>>("strides"));
XLA_FFI_DEFINE_HANDLER(Pipeline, pipeline,
                       bind()
                           .Arg<F32>()  // source
                           .Ret<F32>()  // sums
                           .Attr<int64_t>("delay"));
XLA_FFI_DEFINE_HANDLER(BulkReduce, bulk_reduce,
                       bind()
                           .Arg<F32>()    // source
                           .Arg<F32>()    // before
                           .Ret<F32>());  // total
XLA_FFI_DEFINE_HANDLER(OwnSum, own_sum,
                       bind()
                           .Arg<F32>()    // source
                           .Ret<F32>()    // sums
                           .Ret<F32>());  // out
XLA_FFI_DEFINE_HANDLER(Stmatrix, stmatrix,
                       bind()
                           .Arg<U32>()  // fragments
                           .Ret<U16>()  // matrix
                           .Ret<U32>()  // back
                           .Attr<bool>("transpose"));
XLA_FFI_DEFINE_HANDLER(NamedBarriers, named_barriers, bind().Ret<S32>());  // order
XLA_FFI_DEFINE_HANDLER(DependentPair, dependent_pair,
                       bind()
                           .Arg<F32>()    // source
                           .Ret<F32>()    // out
                           .Ret<F32>()    // scratch
                           .Ret<S32>());  // seen

XLA_FFI_DEFINE_HANDLER(OrderedSum, ordered_sum,
                       bind()
                           .Arg<F32>()    // source
                           .Ret<F32>()    // total
                           .Ret<S32>());  // turn

XLA_FFI_DEFINE_HANDLER(ClaimedSum, claimed_sum,
                       bind()
                           .Arg<F32>()    // source
                           .Ret<F32>()    // total
                           .Ret<S32>());  // states

XLA_FFI_DEFINE_HANDLER(RepeatedRows, repeated_rows,
                       bind()
                           .Arg<U16>()    // a
                           .Arg<U16>()    // b
                           .Ret<F32>());  // d

XLA_FFI_DEFINE_HANDLER(Cluster, cluster,
                       bind()
                           .Arg<U32>()    // source
                           .Arg<U32>()    // constant
                           .Ret<U32>());  // out

template <typename Handler>
nb::capsule handler(Handler* symbol) {
  return nb::capsule(reinterpret_cast<void*>(symbol));
}

}  // namespace

NB_MODULE(_cuda_testing, module) {
  module.def("registrations", [] {
    nb::dict table;
    table["jax_flash_testing.wgmma"] = handler(Wgmma);
    table["jax_flash_testing.tma_load"] = handler(TmaLoad);
    table["jax_flash_testing.tma_store"] = handler(TmaStore);
    table["jax_flash_testing.pipeline"] = handler(Pipeline);
    table["jax_flash_testing.bulk_reduce"] = handler(BulkReduce);
    table["jax_flash_testing.own_sum"] = handler(OwnSum);
    table["jax_flash_testing.stmatrix"] = handler(Stmatrix);
    table["jax_flash_testing.named_barriers"] = handler(NamedBarriers);
    table["jax_flash_testing.dependent_pair"] = handler(DependentPair);
    table["jax_flash_testing.ordered_sum"] = handler(OrderedSum);
    table["jax_flash_testing.claimed_sum"] = handler(ClaimedSum);
    table["jax_flash_testing.repeated_rows"] = handler(RepeatedRows);
    table["jax_flash_testing.cluster"] = handler(Cluster);
    return table;
  });
}

}  // namespace jax_flash::testing
