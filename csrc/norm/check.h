// XLA buffers -> ForwardParams / BackwardParams, with every shape and type checked on the way.
//
// Rows come as [entries, rows, width], entries 1 where all share them; vectors as [entries, width];
// results always have all entries. What is off is an empty buffer of shape (0,). The lists of
// operands and results are those of _ops/norm.py, followed by scratch memory.
#pragma once

#include <initializer_list>
#include <vector>

#include "common/handler.h"
#include "norm/params.h"

namespace jax_flash::norm {

inline ffi::DataType from_dtype(DType dtype) {
  return dtype == DType::kF32 ? ffi::F32 : dtype == DType::kF16 ? ffi::F16 : ffi::BF16;
}

inline ffi::Error expect(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                         int64_t entries, std::initializer_list<int64_t> tail, bool may_share) {
  if (buffer.element_type() != type) return bad_argument(name, type, buffer.element_type());
  const auto dims = buffer.dimensions();
  std::vector<int64_t> expected{entries};
  expected.insert(expected.end(), tail.begin(), tail.end());
  bool matches = dims.size() == expected.size();
  for (size_t axis = 0; matches && axis < dims.size(); ++axis) {
    matches = dims[axis] == expected[axis] || (axis == 0 && may_share && dims[axis] == 1);
  }
  if (matches) return ffi::Error::Success();
  return bad_argument(name, to_string({expected.data(), expected.size()}), to_string(dims));
}

template <typename T>
ffi::Error operand(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                   int64_t entries, std::initializer_list<int64_t> tail, Array<T>& out) {
  if (is_empty(buffer)) return ffi::Error::Success();
  JAX_FLASH_RETURN_IF_ERROR(expect(name, buffer, type, entries, tail, /*may_share=*/true));
  out.data = static_cast<const T*>(buffer.untyped_data());
  out.entry_stride = 1;
  for (int64_t size : tail) out.entry_stride *= size;
  if (buffer.dimensions()[0] == 1) out.entry_stride = 0;
  return ffi::Error::Success();
}

template <typename T>
ffi::Error result(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                  int64_t entries, std::initializer_list<int64_t> tail, T*& out) {
  if (is_empty(buffer)) return ffi::Error::Success();
  JAX_FLASH_RETURN_IF_ERROR(expect(name, buffer, type, entries, tail, /*may_share=*/false));
  out = static_cast<T*>(buffer.untyped_data());
  return ffi::Error::Success();
}

struct Options {
  ffi::AnyBuffer weight, weight1, layerscale;
  ffi::AnyBuffer rowscale, x_subset, out_subset, dropout_state, row_ids;
};

// What both directions share. `like_x` has x's type; rsigma [entries, rows] the number of rows.
inline ffi::Error decode(const Options& in, const ffi::AnyBuffer& like_x,
                         const ffi::AnyBuffer& rsigma, int64_t entries,
                         const ffi::Dictionary& attributes, Problem& p) {
  int64_t threshold;
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "epsilon", p.epsilon));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "is_rms", p.is_rms));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "x_rows", p.x_rows));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "out_rows", p.out_rows));
  JAX_FLASH_RETURN_IF_ERROR(read_attribute(attributes, "dropout_threshold", threshold));
  if (threshold < 0 || threshold > 65535) {
    return bad_argument("dropout_threshold", "0..65535", threshold);
  }
  p.dropout_threshold = static_cast<uint32_t>(threshold);
  p.dropout_scale = 65536.0f / static_cast<float>(65536 - threshold);

  const auto dtype = to_dtype(like_x.element_type());
  if (!dtype) return bad_argument("x", "float32, float16 or bfloat16", like_x.element_type());
  p.dtype = *dtype;
  const auto weight_dtype = to_dtype(in.weight.element_type());
  if (!weight_dtype || (*weight_dtype != DType::kF32 && *weight_dtype != p.dtype)) {
    return bad_argument("weight", "float32 or x's type", in.weight.element_type());
  }
  p.weight_dtype = *weight_dtype;

  const auto vector = in.weight.dimensions(), rows = rsigma.dimensions();
  if (vector.size() != 2) return bad_argument("weight", "[entries, width]", to_string(vector));
  if (rows.size() != 2) return bad_argument("rsigma", "[entries, rows]", to_string(rows));
  p.entries = entries;
  p.rows = rows[1];
  p.width = vector[1];
  if (p.width > kMaxWidth) return bad_argument("weight", "at most 16384 features", p.width);
  if (p.entries <= 0 || p.rows <= 0 || p.width <= 0 || p.rows > INT32_MAX / 2) {
    return bad_argument("rsigma", "1 to 2^30 rows", to_string(rows));
  }

  const ffi::DataType weights = in.weight.element_type();
  JAX_FLASH_RETURN_IF_ERROR(operand("weight", in.weight, weights, entries, {p.width}, p.weight));
  JAX_FLASH_RETURN_IF_ERROR(operand("weight1", in.weight1, weights, entries, {p.width}, p.weight1));
  JAX_FLASH_RETURN_IF_ERROR(
      operand("layerscale", in.layerscale, weights, entries, {p.width}, p.layerscale));
  JAX_FLASH_RETURN_IF_ERROR(
      operand("rowscale", in.rowscale, ffi::F32, entries, {p.rows}, p.rowscale));
  JAX_FLASH_RETURN_IF_ERROR(
      operand("x_subset", in.x_subset, ffi::S32, entries, {p.rows}, p.x_subset));
  JAX_FLASH_RETURN_IF_ERROR(
      operand("out_subset", in.out_subset, ffi::S32, entries, {p.rows}, p.out_subset));
  JAX_FLASH_RETURN_IF_ERROR(
      operand("dropout_state", in.dropout_state, ffi::U32, entries, {4}, p.dropout_state));
  JAX_FLASH_RETURN_IF_ERROR(operand("row_ids", in.row_ids, ffi::U32, entries, {p.rows}, p.row_ids));
  if (threshold > 0 && (p.dropout_state.data == nullptr || p.row_ids.data == nullptr)) {
    return bad_argument("dropout_state", "an array, and row_ids", "nothing");
  }
  if (p.x_subset.data == nullptr) p.x_rows = p.rows;
  if (p.out_subset.data == nullptr) p.out_rows = p.rows;
  return ffi::Error::Success();
}

// The type of the arrays of the stream that are on: one and the same, float32 or x's.
inline ffi::Error stream_type(std::initializer_list<ffi::AnyBuffer> arrays, Problem& p) {
  p.stream_dtype = p.dtype;
  for (const auto& array : arrays) {
    if (is_empty(array)) continue;
    const auto dtype = to_dtype(array.element_type());
    if (!dtype || (*dtype != DType::kF32 && *dtype != p.dtype)) {
      return bad_argument("stream", "float32 or x's type", array.element_type());
    }
    p.stream_dtype = *dtype;
  }
  return ffi::Error::Success();
}

inline ffi::Error claims(const ffi::AnyBuffer& buffer, const Array<int32_t>& subset,
                         int64_t entries, int64_t compact_rows, Claims*& out) {
  if (subset.data == nullptr) return ffi::Error::Success();
  if (is_empty(buffer)) return bad_argument("scratch", "[entries, 2, compact rows]", "nothing");
  return result("scratch", buffer, ffi::U32, entries, {2, compact_rows}, out);
}

inline ffi::Error decode_forward(const CallFrame& call, ForwardParams& p) {
  const auto &in = call.operands, &out = call.results;
  const Options options{in[3], in[5], in[7], in[8], in[9], in[10], in[11], in[12]};
  if (out[0].dimensions().size() != 3) {
    return bad_argument("z", "[entries, rows, width]", to_string(out[0].dimensions()));
  }
  const int64_t n = out[0].dimensions()[0];
  JAX_FLASH_RETURN_IF_ERROR(decode(options, in[0], out[4], n, call.attributes, p));
  JAX_FLASH_RETURN_IF_ERROR(stream_type({in[2], out[2]}, p));
  const ffi::DataType type = from_dtype(p.dtype), stream = from_dtype(p.stream_dtype);
  const ffi::DataType weights = from_dtype(p.weight_dtype);
  const int64_t rows = p.rows, width = p.width;
  JAX_FLASH_RETURN_IF_ERROR(operand("x", in[0], type, n, {p.x_rows, width}, p.x));
  JAX_FLASH_RETURN_IF_ERROR(operand("x1", in[1], type, n, {rows, width}, p.x1));
  JAX_FLASH_RETURN_IF_ERROR(operand("residual", in[2], stream, n, {rows, width}, p.residual));
  JAX_FLASH_RETURN_IF_ERROR(operand("bias", in[4], weights, n, {width}, p.bias));
  JAX_FLASH_RETURN_IF_ERROR(operand("bias1", in[6], weights, n, {width}, p.bias1));
  JAX_FLASH_RETURN_IF_ERROR(result("z", out[0], type, n, {p.out_rows, width}, p.z));
  JAX_FLASH_RETURN_IF_ERROR(result("z1", out[1], type, n, {p.out_rows, width}, p.z1));
  JAX_FLASH_RETURN_IF_ERROR(result("stream", out[2], stream, n, {rows, width}, p.stream));
  JAX_FLASH_RETURN_IF_ERROR(result("mean", out[3], ffi::F32, n, {rows}, p.mean));
  JAX_FLASH_RETURN_IF_ERROR(result("rsigma", out[4], ffi::F32, n, {rows}, p.rsigma));
  JAX_FLASH_RETURN_IF_ERROR(result("mask", out[5], ffi::PRED, n, {rows, width}, p.mask));
  JAX_FLASH_RETURN_IF_ERROR(result("mask1", out[6], ffi::PRED, n, {rows, width}, p.mask1));
  if ((p.weight1.data != nullptr) != (p.z1 != nullptr)) {
    return bad_argument("z1", "weight1 and z1 together", "one of them");
  }
  return claims(out[7], p.out_subset, n, p.out_rows, p.claims);
}

inline ffi::Error decode_backward(const CallFrame& call, BackwardParams& p) {
  const auto &in = call.operands, &out = call.results;
  const Options options{in[4], in[5], in[6], in[10], in[11], in[12], in[13], in[14]};
  const auto dims = out[0].dimensions();
  if (dims.size() != 3) return bad_argument("dx", "[entries, rows, width]", to_string(dims));
  const int64_t n = dims[0];
  JAX_FLASH_RETURN_IF_ERROR(decode(options, in[7], in[3], n, call.attributes, p));
  JAX_FLASH_RETURN_IF_ERROR(stream_type({in[1], in[9], out[2]}, p));
  const ffi::DataType type = from_dtype(p.dtype), stream = from_dtype(p.stream_dtype);
  const int64_t rows = p.rows, width = p.width;
  JAX_FLASH_RETURN_IF_ERROR(operand("x", in[0], type, n, {p.x_rows, width}, p.x));
  JAX_FLASH_RETURN_IF_ERROR(operand("stream", in[1], stream, n, {rows, width}, p.stream));
  JAX_FLASH_RETURN_IF_ERROR(operand("mean", in[2], ffi::F32, n, {rows}, p.mean));
  JAX_FLASH_RETURN_IF_ERROR(operand("rsigma", in[3], ffi::F32, n, {rows}, p.rsigma));
  JAX_FLASH_RETURN_IF_ERROR(operand("dz", in[7], type, n, {p.out_rows, width}, p.dz));
  JAX_FLASH_RETURN_IF_ERROR(operand("dz1", in[8], type, n, {p.out_rows, width}, p.dz1));
  JAX_FLASH_RETURN_IF_ERROR(operand("dstream", in[9], stream, n, {rows, width}, p.dstream));
  JAX_FLASH_RETURN_IF_ERROR(result("dx", out[0], type, n, {p.x_rows, width}, p.dx));
  JAX_FLASH_RETURN_IF_ERROR(result("dx1", out[1], type, n, {p.x_rows, width}, p.dx1));
  JAX_FLASH_RETURN_IF_ERROR(result("dresidual", out[2], stream, n, {rows, width}, p.dresidual));
  const auto sums_dtype = to_dtype(out[3].element_type());
  if (!sums_dtype || (*sums_dtype != DType::kF32 && *sums_dtype != p.weight_dtype)) {
    return bad_argument("dweight", "float32 or weight's type", out[3].element_type());
  }
  p.sums_dtype = *sums_dtype;
  void** const sums[kSums] = {&p.dweight, &p.dbias, &p.dweight1, &p.dbias1, &p.dlayerscale};
  for (int i = 0; i < kSums; ++i) {
    JAX_FLASH_RETURN_IF_ERROR(
        result("a sum over rows", out[3 + i], from_dtype(p.sums_dtype), n, {width}, *sums[i]));
  }
  if (p.stream.data == nullptr) return bad_argument("stream", "an array", "nothing");
  if (p.is_rms != (p.mean.data == nullptr))
    return bad_argument("mean", "none in RMSNorm alone", "");
  if ((p.dweight1 != nullptr) != (p.weight1.data != nullptr && p.dz1.data != nullptr)) {
    return bad_argument("dweight1", "weight1, dz1 and dweight1 together", "some of them");
  }
  if (p.dlayerscale != nullptr && (p.layerscale.data == nullptr || is_empty(in[0]))) {
    return bad_argument("dlayerscale", "x and layerscale with it", "some of them");
  }
  const auto partials = out[9].dimensions();
  int num_sums = 0;
  for (int i = 0; i < kSums; ++i) num_sums += *sums[i] != nullptr;
  if (partials.size() != 4 || partials[0] != num_sums || partials[1] != n || partials[2] < 1 ||
      partials[3] != width || out[9].element_type() != ffi::F32) {
    return bad_argument("partials", "float32 [sums, entries, CTAs, width]", to_string(partials));
  }
  p.partials = static_cast<float*>(out[9].untyped_data());
  p.num_partials = partials[2];
  return claims(out[8], p.x_subset, n, p.x_rows, p.claims);
}

}  // namespace jax_flash::norm
