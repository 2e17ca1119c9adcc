// The primitive operations of isa_portable.h in AVX2, FMA and F16C. Included by *_avx2.cc alone.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace atoma {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr int kStoredRows = 4;  // up to which factors are read as they are stored
  static constexpr int vectors(int rows) { return rows < 4 ? 4 : 2; }

  using Floats = __m256;
  using Ints = __m256i;
  using Bytes = __m256i;

  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
  static Floats set(float x) { return _mm256_set1_ps(x); }
  static Ints set(int32_t x) { return _mm256_set1_epi32(x); }
  static Floats add(Floats x, Floats y) { return _mm256_add_ps(x, y); }
  static Floats sub(Floats x, Floats y) { return _mm256_sub_ps(x, y); }
  static Floats mul(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
  static Floats fma(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
  static Floats fnma(Floats x, Floats y, Floats z) { return _mm256_fnmadd_ps(x, y, z); }
  static Floats to_float(Ints x) { return _mm256_cvtepi32_ps(x); }
  static Ints add(Ints x, Ints y) { return _mm256_add_epi32(x, y); }
  static Ints sub(Ints x, Ints y) { return _mm256_sub_epi32(x, y); }
  static Ints join_planes(Ints x, Ints y) {
    const Ints times254 = _mm256_sub_epi32(_mm256_slli_epi32(x, 8), _mm256_slli_epi32(x, 1));
    return _mm256_add_epi32(times254, y);
  }

  static Floats load_f16(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Floats load_bf16(const uint16_t* from) {
    const Ints wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Floats load_int8(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }

  static Ints magnitude_bits(Floats x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  }
  static Ints max(Ints x, Ints y) { return _mm256_max_epi32(x, y); }
  static int32_t largest(Ints x) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm_cvtsi128_si32(half);
  }
  static int32_t total(Ints x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
  }
  static Ints rounded(Floats x) { return _mm256_cvtps_epi32(x); }
  static void store_int8(int8_t* to, const Ints (&x)[4]) {
    // Packed within halves of vectors: fours of all in turn.
    const Ints fours = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
    const Ints bytes = _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
  }

  static Bytes load_bytes(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static Bytes repeat4(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return _mm256_set1_epi32(four);
  }
  template <int shift, int mask>
  static Bytes field(Bytes x) {
    if constexpr (shift > 0) x = _mm256_srli_epi16(x, shift);
    if constexpr (mask < 255) x = _mm256_and_si256(x, _mm256_set1_epi8(mask));
    return x;
  }
  static Bytes either(Bytes x, Bytes y) { return _mm256_or_si256(x, y); }
  static void store_bytes(uint8_t* to, Bytes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
  static Bytes load_table(const uint8_t* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
  }
  static Bytes look_up(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }

  // GCC would add the products of several steps to each other first, and has no registers to keep them in.
  static __m256i in_order(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
  }

  // vpmaddubsw saturates sums of two products of unsigned and signed bytes. With codes up to 255 they overflow; with
  // |number| up to 128 and the number's sign moved to the activation, whose -128 does not occur, they do not.
  struct Wide {
    static constexpr int kMaxRows = 4;
    static constexpr int kBias = 0;
    struct Weights {
      __m256i magnitude, number;
    };
    using Sum = __m256i;
    static Weights prepare(Bytes codes) {
      const __m256i number = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
      return {_mm256_abs_epi8(number), number};
    }
    static Sum zero() { return _mm256_setzero_si256(); }
    static Sum step(Sum sum, Weights w, Bytes x) {
      const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.number));
      return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
    }
    static Ints finish(Sum sum) { return sum; }
  };
  // 2 steps × 2 products of at most 63 · 127 fit 16 bits.
  struct Medium {
    static constexpr int kMaxRows = 4;
    using Weights = __m256i;
    using Sum = __m256i;
    static Weights prepare(Bytes codes) { return codes; }
    static Sum zero() { return _mm256_setzero_si256(); }
    static Sum two_steps(Sum sum, Weights w0, Bytes x0, Weights w1, Bytes x1) {
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
      return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
    }
    static Ints finish(Sum sum) { return sum; }
  };
  // 8 steps × 2 products of at most 15 · 127 fit 16 bits.
  struct Small {
    static constexpr int kMaxRows = 6;  // twelve sums, two vectors of weights, one of activations, and a mask
    using Weights = __m256i;
    using Sum = __m256i;
    static Weights prepare(Bytes codes) { return codes; }
    static Sum zero() { return _mm256_setzero_si256(); }
    static Sum step(Sum sum, Weights w, Bytes x) {
      return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)));
    }
    static Ints finish(Sum sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
  };
};

}  // namespace
}  // namespace atoma
