// One vector of floats, as wide as the instruction set that this copy is compiled for, and the few
// operations that the language does not spell (+ - * / compare and select are C++ operators on it).
//
// Everything under isa/ lives in namespace JAX_FLASH_ISA, which the build sets, and uses no inline
// function from outside: two copies of one name would let the linker give AVX-512 code to a CPU
// that lacks it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace jax_flash::attention::cpu::JAX_FLASH_ISA {

// kLanes floats a vector. A product's inner block is kBlockRows x kBlockVecs accumulators: 8 x 3
// of 32 registers, 4 x 3 or 4 x 2 of 16, the rest hold the operands.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16, kBlockRows = 8, kBlockVecs = 3;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8, kBlockRows = 4, kBlockVecs = 3;
#else
inline constexpr int kLanes = 4, kBlockRows = 4, kBlockVecs = 2;
#endif

typedef float Float __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Wide __attribute__((vector_size(4 * kLanes)));  // kLanes / 2 of them
typedef uint32_t Narrow __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));  // kLanes 16-bit floats

#define JAX_FLASH_INLINE [[gnu::always_inline]] inline

template <typename V>
JAX_FLASH_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <typename V>
JAX_FLASH_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}
template <typename To, typename From>
JAX_FLASH_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

JAX_FLASH_INLINE Float splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Float{x, x, x, x};
#endif
}
JAX_FLASH_INLINE Int splat_int(int32_t x) { return Int{} + x; }

// Where one of the two is NaN, the result is b.
JAX_FLASH_INLINE Float max(Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// 32 x 32 -> 64 bits, from the low halves of the lanes.
JAX_FLASH_INLINE Wide multiply_low(Wide a, Wide b) {
#if defined(__AVX512F__)
  return bit_cast<Wide>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Wide>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<Wide>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// 2^x for x <= 127, within 1.5 ulp; -inf and everything below -126 give 0, NaN stays NaN.
JAX_FLASH_INLINE Float exp2(Float x) {
  // Minimax polynomial of 2^f on [-1/2, 1/2] with 2^0 = 1 exactly; relative error 9.1e-8.
  const auto polynomial = [](Float f) {
    Float p = splat(1.326472715e-3f);
    p = p * f + 9.671512643e-3f;
    p = p * f + 5.550733743e-2f;
    p = p * f + 2.402224209e-1f;
    p = p * f + 6.931469776e-1f;
    return p * f + 1.0f;
  };
#if defined(__AVX512F__)
  // -256 keeps f finite at -inf; the scale instruction underflows to 0 by itself.
  x = max(splat(-256.0f), x);
  const Float n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(x - n), n);
#else
  const Int is_zero = x < -126.0f;
  x = max(splat(-126.0f), x);
  // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum, ready for the exponent field.
  const Float shifter = splat(12582912.0f);
  const Float shifted = x + shifter;
  const Float p = polynomial(x - (shifted - shifter));
  const Int scaled = bit_cast<Int>(p) + (bit_cast<Int>(shifted) << 23);
  return bit_cast<Float>(scaled & ~is_zero);
#endif
}

}  // namespace jax_flash::attention::cpu::JAX_FLASH_ISA
