// Vectors of bfloat16 whose products AVX-512 BF16 sums in float32: what `dots.h` needs of them. Denormal numbers count as
// zero there. Included by *_avx512bf16.cc alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "float_vectors.h"

namespace atoma {
namespace {

// A lane of a sum takes two numbers that lie together.
struct Avx512BfloatVectors : Avx512Vectors {
  static constexpr int kStep = 32;
  using Operand = __m512bh;

  static Operand load(const BFloat16* from) { return (Operand)_mm512_loadu_si512(from); }
  static V fma(Operand a, Operand b, V c) { return _mm512_dpbf16_ps(c, a, b); }
};

inline void round_to_bfloat(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = count - i < 16 ? (1u << (count - i)) - 1 : 0xffff;
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, x + i));
    _mm256_mask_storeu_epi16(out + i, there, (__m256i)rounded);
  }
}

}  // namespace
}  // namespace atoma
