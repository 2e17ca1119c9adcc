// Vectors of floats for one instruction set: what attention, dense products and sampling compute with. Owns loads of each
// type that a KV cache or a weight keeps, exp and tanh. Knows none of these.
//
// Included by translation units that are compiled for one instruction set each. All of it lies in an unnamed namespace,
// and uses no templates of the standard library: of functions with one name in several units the linker keeps one, and
// that might be the one with instructions that the processor lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace atoma {
namespace {

// Stored types whose bits are not a number of C++. int8 codes are `int8_t`.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Float8 {  // e4m3, finite only: 0x7F and 0xFF are NaN
  uint8_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The compiler's own vector types, and the lanes of two vectors by turns: of their first halves, and of their last.
template <int N>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static V first_by_turns(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static V last_by_turns(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
};
template <>
struct Lanes<8> {
  typedef float V __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  static V first_by_turns(V a, V b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static V last_by_turns(V a, V b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};
template <>
struct Lanes<16> {
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  static V first_by_turns(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  static V last_by_turns(V a, V b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
};

// N floats; instruction sets add what those types cannot express.
template <int N>
struct VectorsOf {
  static constexpr int kWidth = N;
  using V = typename Lanes<N>::V;
  // What `fma` multiplies, and the numbers in it: another type where products of narrower numbers add up in a lane.
  using Operand = V;
  static constexpr int kStep = N;
  using I = typename Lanes<N>::I;

  static V load(const float* from) {
    V v{};
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
  static void store(float* to, V v) { std::memcpy(to, &v, sizeof(v)); }
  // Which types `store` takes.
  template <class Stored>
  static constexpr bool kStores = __is_same(Stored, float);
  static V set1(float x) {
    V v{};
    for (int i = 0; i < N; i++) v[i] = x;
    return v;
  }
  static V zero() { return V{}; }
  static V fma(V a, V b, V c) { return a * b + c; }
  // The second one where either is NaN.
  static V max(V a, V b) { return a > b ? a : b; }
  static V min(V a, V b) { return a < b ? a : b; }
  // `value` where low ≤ x ≤ high, else `otherwise`.
  static V within(V x, V low, V high, V value, V otherwise) {
    return ((x >= low) & (x <= high)) ? value : otherwise;
  }

  // Turns N vectors into those of their first lanes, of their second ones, and so on.
  static void transpose(V (&rows)[N]) {
#pragma GCC unroll 4
    for (int step = 1; step < N; step *= 2) {
      V next[N];
#pragma GCC unroll 8
      for (int i = 0; i < N / 2; i++) {
        next[2 * i] = Lanes<N>::first_by_turns(rows[i], rows[i + N / 2]);
        next[2 * i + 1] = Lanes<N>::last_by_turns(rows[i], rows[i + N / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; i++) rows[i] = next[i];
    }
  }

  static float sum(V v) {
    float lanes[N];
    store(lanes, v);
    for (int step = N / 2; step; step /= 2)
      for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return lanes[0];
  }
  // NaN is passed over.
  static float largest(V v) {
    float lanes[N];
    store(lanes, v);
    float top = lanes[0];
    for (int i = 1; i < N; i++) top = lanes[i] > top ? lanes[i] : top;
    return top;
  }
  // The sums of four vectors.
  static void sums4(const V* v, float* to) {
    for (int i = 0; i < 4; i++) to[i] = sum(v[i]);
  }

  static V load(const int8_t* from) {
    V v{};
    for (int i = 0; i < N; i++) v[i] = from[i];
    return v;
  }
  static V load(const BFloat16* from) {
    I v{};
    for (int i = 0; i < N; i++) v[i] = static_cast<int32_t>(static_cast<uint32_t>(from[i].bits) << 16);
    return bits_as<V>(v);
  }
  static V load(const Half* from) {
    I v{};
    for (int i = 0; i < N; i++) v[i] = from[i].bits;
    // The exponent's bias is 15, and that of a float 127. Infinities and NaN have an exponent of ones in both.
    I size = (v & 0x7C00) == 0x7C00 ? ((v & 0x7FFF) << 13) | 0x7F800000 : ((v & 0x7FFF) << 13) + (112 << 23);
    // Without an exponent there is no leading one: it is put there, and taken off again. (Shifted into the place of a
    // float without an exponent, the number would be flushed to zero.)
    V x = (v & 0x7C00) == 0 ? bits_as<V>(size + (1 << 23)) - 0x1p-14f : bits_as<V>(size);
    return bits_as<V>(bits_as<I>(x) | ((v & 0x8000) << 16));
  }
  static V load(const Float8* from) {
    I v{};
    for (int i = 0; i < N; i++) v[i] = from[i].bits;
    return float8(v);
  }

 protected:
  // From bytes in the lanes, as halves are read. The exponent's bias is 7.
  static V float8(I v) {
    const I size = v & 0x7F, rest = size << 20;
    V x = size < 8 ? bits_as<V>(rest + (121 << 23)) - 0x1p-6f : bits_as<V>(rest + (120 << 23));
    x = size == 0x7F ? bits_as<V>(size | 0x7FC00000) : x;
    return bits_as<V>(bits_as<I>(x) | ((v & 0x80) << 24));
  }
};

struct PortableVectors : VectorsOf<4> {};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct Avx2Vectors : VectorsOf<8> {
  using VectorsOf<8>::load, VectorsOf<8>::store;
  template <class Stored>
  static constexpr bool kStores = __is_same(Stored, float) || __is_same(Stored, Half);
  static void store(Half* to, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static float sum(V v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void sums4(const V* v, float* to) {
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
  static __m128i bytes(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
  static __m128i words(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static V load(const int8_t* from) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(from))); }
  static V load(const BFloat16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words(from)), 16));
  }
  static V load(const Half* from) { return _mm256_cvtph_ps(words(from)); }
  static V load(const Float8* from) { return float8(bits_as<I>(_mm256_cvtepu8_epi32(bytes(from)))); }
};
#endif

#if defined(__AVX512F__)
struct Avx512Vectors : VectorsOf<16> {
  using VectorsOf<16>::load, VectorsOf<16>::store;
  template <class Stored>
  static constexpr bool kStores = Avx2Vectors::kStores<Stored>;
  static void store(Half* to, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static __m256 folded(V v) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(v), high);
  }
  static float sum(V v) { return Avx2Vectors::sum(folded(v)); }
  static void sums4(const V* v, float* to) {
    const Avx2Vectors::V halves[4] = {folded(v[0]), folded(v[1]), folded(v[2]), folded(v[3])};
    Avx2Vectors::sums4(halves, to);
  }
  static __m128i bytes(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static __m256i words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static V load(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(from))); }
  static V load(const BFloat16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words(from)), 16));
  }
  static V load(const Half* from) { return _mm512_cvtph_ps(words(from)); }
  static V load(const Float8* from) { return float8(bits_as<I>(_mm512_cvtepu8_epi32(bytes(from)))); }
};
#endif

// The first n < kStep values, zeros behind them: nothing behind the values is read.
template <class Isa, class Stored>
inline typename Isa::Operand load_part(const Stored* from, int n) {
  Stored values[Isa::kStep] = {};
  std::memcpy(values, from, n * sizeof(Stored));
  return Isa::load(values);
}

// e^x to about 1e-7 of itself; 0 below -87, e^88 at most.
template <class Isa>
inline typename Isa::V exp(typename Isa::V x) {
  using V = typename Isa::V;
  using I = typename Isa::I;
  const V low = Isa::set1(-87.0f);
  // 1.5 · 2^23 leaves no bits for a fraction: adding it rounds to an integer, which then stands in the low bits. With
  // 127 more they are the exponent of 2^n.
  const V shift = Isa::set1(0x1.8p23f + 127.0f);
  const V clamped = Isa::max(low, Isa::min(Isa::set1(88.0f), x));  // a NaN stays one
  const V shifted = Isa::fma(clamped, Isa::set1(1.44269504f), shift);
  const V n = shifted - shift;
  // ln 2 in two parts, so that n · ln 2 loses nothing.
  V r = Isa::fma(n, Isa::set1(-0.693359375f), clamped);
  r = Isa::fma(n, Isa::set1(2.12194440e-4f), r);
  // The least relative error, 4e-9, of degree 6 for |r| ≤ ln 2 / 2 with a start of 1 + r.
  V p = Isa::set1(0x1.6a2434p-10f);
  p = Isa::fma(p, r, Isa::set1(0x1.1239e2p-7f));
  p = Isa::fma(p, r, Isa::set1(0x1.5558f2p-5f));
  p = Isa::fma(p, r, Isa::set1(0x1.555492p-3f));
  p = Isa::fma(p, r, Isa::set1(0x1.fffffcp-2f));
  p = Isa::fma(p, r, Isa::set1(1.0f));
  p = Isa::fma(p, r, Isa::set1(1.0f));
  p = p * bits_as<V>(bits_as<I>(shifted) << 23);
  return x < low ? Isa::zero() : p;
}

// tanh x to a few 1e-7 of itself.
template <class Isa>
inline typename Isa::V tanh(typename Isa::V x) {
  using V = typename Isa::V;
  const V size = x < 0.0f ? -x : x;
  const V far = 1.0f - 2.0f / (exp<Isa>(size + size) + 1.0f);
  const V square = x * x;
  V near = Isa::set1(62.0f / 2835);  // Taylor: 1 - 2/(e^2x + 1) loses digits near 0
  near = Isa::fma(near, square, Isa::set1(-17.0f / 315));
  near = Isa::fma(near, square, Isa::set1(2.0f / 15));
  near = Isa::fma(near, square, Isa::set1(-1.0f / 3));
  near = Isa::fma(near * square, x, x);
  return size < 0.25f ? near : (x < 0.0f ? -far : far);
}

}  // namespace
}  // namespace atoma
