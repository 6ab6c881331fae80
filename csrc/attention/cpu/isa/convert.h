// bfloat16 and float16 <-> float32, a vector at a time; rounding is to nearest even and NaN stays
// NaN.
#pragma once

#include "attention/cpu/isa/vec.h"

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {

JAX_FLASH_INLINE Float from_bf16(Half h) {
  return bit_cast<Float>(__builtin_convertvector(h, Int) << 16);
}

JAX_FLASH_INLINE Half to_bf16(Float x) {
#if defined(__AVX512BF16__)
  return bit_cast<Half>(_mm512_cvtneps_pbh(x));
#else
  const Int bits = bit_cast<Int>(x);
  const Int rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Int quiet = bits | 0x400000;  // a NaN whose payload sits low must not round to infinity
  const Int kept = x != x ? quiet : rounded;
  return __builtin_convertvector((kept >> 16) & 0xffff, Half);
#endif
}

JAX_FLASH_INLINE Float from_f16(Half h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bit_cast<__m256i>(h));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(h));
#else
  // Exponent and mantissa move into place with the bias mended; a denormal borrows an exponent of
  // 2^-14 that the subtraction takes back (no float32 denormal on the way: those may be flushed).
  const Int bits = __builtin_convertvector(h, Int);
  const Int moved = (bits & 0x7fff) << 13;
  const Int denormal = bit_cast<Int>(bit_cast<Float>(moved + (113 << 23)) - 6.103515625e-5f);
  const Int special = moved | 0x7f800000;
  Int result = moved < (1 << 23) ? denormal : moved + (112 << 23);
  result = moved >= (31 << 23) ? special : result;
  return bit_cast<Float>(result | ((bits & 0x8000) << 16));
#endif
}

JAX_FLASH_INLINE Half to_f16(Float x) {
#if defined(__AVX512F__)
  return bit_cast<Half>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<Half>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Int bits = bit_cast<Int>(x);
  const Int magnitude = bits & 0x7fffffff;
  const Int sign = (bits >> 16) & 0x8000;
  // Normal results: move the bias and round at bit 13; a carry into the exponent is right.
  const Int normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Denormal results: adding 1/2 puts the last kept bit where the hardware rounds.
  const Int denormal = bit_cast<Int>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000;
  const Int infinity = splat_int(0x7c00);
  Int result = magnitude < (113 << 23) ? denormal : normal;
  result = magnitude >= (143 << 23) ? infinity : result;
  result = magnitude > 0x7f800000 ? splat_int(0x7e00) : result;
  return __builtin_convertvector(result | sign, Half);
#endif
}

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
