// The primitive operations of isa_portable.h in AVX-512 with VNNI. Included by *_avx512.cc alone.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace atoma {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr int kStoredRows = 4;  // up to which factors are read as they are stored
  static constexpr int vectors(int) { return 2; }

  using Floats = __m512;
  using Ints = __m512i;
  using Bytes = __m512i;

  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
  static Floats set(float x) { return _mm512_set1_ps(x); }
  static Ints set(int32_t x) { return _mm512_set1_epi32(x); }
  static Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
  static Floats sub(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
  static Floats mul(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
  static Floats fma(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }
  static Floats fnma(Floats x, Floats y, Floats z) { return _mm512_fnmadd_ps(x, y, z); }
  static Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
  static Ints add(Ints x, Ints y) { return _mm512_add_epi32(x, y); }
  static Ints sub(Ints x, Ints y) { return _mm512_sub_epi32(x, y); }
  static Ints join_planes(Ints x, Ints y) {
    const Ints times254 = _mm512_sub_epi32(_mm512_slli_epi32(x, 8), _mm512_slli_epi32(x, 1));
    return _mm512_add_epi32(times254, y);
  }

  static Floats load_f16(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Floats load_bf16(const uint16_t* from) {
    const Ints wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Floats load_int8(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }

  static Ints magnitude_bits(Floats x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  }
  static Ints max(Ints x, Ints y) { return _mm512_max_epi32(x, y); }
  static int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x); }
  static int32_t total(Ints x) { return _mm512_reduce_add_epi32(x); }
  static Ints rounded(Floats x) { return _mm512_cvtps_epi32(x); }
  static void store_int8(int8_t* to, const Ints (&x)[2]) {
    for (int i = 0; i < 2; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + i, _mm512_cvtepi32_epi8(x[i]));
  }

  static Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static Bytes repeat4(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
  }
  template <int shift, int mask>
  static Bytes field(Bytes x) {
    if constexpr (shift > 0) x = _mm512_srli_epi16(x, shift);
    if constexpr (mask < 255) x = _mm512_and_si512(x, _mm512_set1_epi8(mask));
    return x;
  }
  static Bytes either(Bytes x, Bytes y) { return _mm512_or_si512(x, y); }
  static void store_bytes(uint8_t* to, Bytes x) { _mm512_storeu_si512(to, x); }
  static Bytes load_table(const uint8_t* sixteen) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
  }
  static Bytes look_up(Bytes table, Bytes codes) { return _mm512_shuffle_epi8(table, codes); }

  // vpdpbusd multiplies unsigned codes by signed activations and sums four products exactly.
  struct Products {
    static constexpr int kMaxRows = 4;
    using Weights = __m512i;
    using Sum = __m512i;
    static Weights prepare(Bytes codes) { return codes; }
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum step(Sum sum, Weights w, Bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Ints finish(Sum sum) { return sum; }
  };
  struct Wide : Products {
    static constexpr int kBias = 128;  // codes are numbers + 128, and the sum is the codes'
  };
  struct Small : Products {};
  struct Medium : Products {
    static Sum two_steps(Sum sum, Weights w0, Bytes x0, Weights w1, Bytes x1) { return step(step(sum, w0, x0), w1, x1); }
  };
};

}  // namespace
}  // namespace atoma
