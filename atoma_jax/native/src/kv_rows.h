// Rows of a paged KV cache, [P, K, S, H]: where they lie, and how a vector of K or V becomes what is stored of it, to the
// same bits as `pallas_kernels/kv_pages.py` makes. For one instruction set, see `float_vectors.h`.
#pragma once

#include "float_vectors.h"
#include "paged_attention.h"

namespace atoma {
namespace {

// Index of a slot's scale; times H, that of its row.
inline int64_t slot_index(const AttentionProblem& p, int page, int kv_head, int slot) {
  return (static_cast<int64_t>(page) * p.K + kv_head) * p.S + slot;
}

// That of a token of a row's context.
inline int64_t token_index(const AttentionProblem& p, int row, int kv_head, int token) {
  return slot_index(p, p.page_table[static_cast<int64_t>(row) * p.W + token / p.S], kv_head, token % p.S);
}

// Calls use(first, count, index of the first slot, that of the next page or -1) for each page's part of the tokens
// first … end - 1 of a row's context.
template <class Use>
inline void for_each_page(const AttentionProblem& p, int row, int kv_head, int first, int end, Use&& use) {
  for (int at = first; at < end;) {
    const int left = end - at, of_page = p.S - at % p.S, count = left < of_page ? left : of_page;
    const int64_t next = count < left ? token_index(p, row, kv_head, at + count) : -1;
    use(at, count, token_index(p, row, kv_head, at), next);
    at += count;
  }
}

// Asks for rows that will be read soon. The processor itself looks ahead in the 4 KiB that it reads, and pages lie
// anywhere; behind the last row may lie anything: that reads nothing.
template <class Stored>
inline void fetch_rows(const Stored* rows, int count, int H) {
  constexpr int64_t kLine = 64;
  const char* from = reinterpret_cast<const char*>(rows);
  const int64_t bytes = static_cast<int64_t>(count) * H * sizeof(Stored);
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to the nearest, halves to even
  return static_cast<uint16_t>(x == x ? rounded : ((bits >> 16) | 0x40));
}

inline uint16_t to_half(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00 | ((size >> 13) & 0x3FF));
  if (size >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and above
  if (size < 0x38800000) {                                             // below 2^-14: multiples of 2^-24
    // 0.5's last bit is worth 2^-24: the sum rounds to it.
    const float sum = bits_as<float>(size) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(sum) - bits_as<uint32_t>(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13));
}

// For |x| up to 448.
inline uint8_t to_float8(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 24) & 0x80, size = bits & 0x7FFFFFFF;
  if (size < 0x3C800000) {  // below 2^-6: multiples of 2^-9, the last bit of 2^14
    const float sum = bits_as<float>(size) + 0x1p14f;
    return static_cast<uint8_t>(sign | (bits_as<uint32_t>(sum) - bits_as<uint32_t>(0x1p14f)));
  }
  return static_cast<uint8_t>(sign | ((size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20));
}

inline void encode(float x, float* to) { *to = x; }
inline void encode(float x, BFloat16* to) { to->bits = to_bfloat16(x); }
inline void encode(float x, Half* to) { to->bits = to_half(x); }
inline void encode(float x, Float8* to) { to->bits = to_float8(x); }
inline void encode(float x, int8_t* to) {
  *to = static_cast<int8_t>((x + 0x1.8p23f) - 0x1.8p23f);  // to the nearest, halves to even; |x| is 127 at most
}

template <class Stored>
constexpr float kLargestCode = 0.0f;  // of formats without scales
template <>
constexpr float kLargestCode<int8_t> = 127.0f;
template <>
constexpr float kLargestCode<Float8> = 448.0f;

// Stores one vector, and its scale where the format has one.
template <class Isa, class Stored>
inline void store_row(const float* x, int H, Stored* to, float* scale) {
  if constexpr (kLargestCode<Stored> == 0) {
    int h = 0;
    if constexpr (Isa::template kStores<Stored>) {
      for (; h + Isa::kWidth <= H; h += Isa::kWidth) Isa::store(to + h, Isa::load(x + h));
    }
    for (; h < H; h++) encode(x[h], to + h);
  } else {
    float largest = 1e-30f;  // `kv_pages.SMALLEST`
    bool finite = true;
    for (int h = 0; h < H; h++) {
      const float size = x[h] < 0 ? -x[h] : x[h];
      finite &= size < INFINITY;
      largest = size > largest ? size : largest;
    }
    *scale = finite ? largest * (1.0f / kLargestCode<Stored>) : NAN;  // XLA's rounding of a quotient by a constant
    const float divisor = *scale;
    for (int h = 0; h < H; h++) {
      float code = finite ? x[h] / divisor : 0.0f;
      code = code > kLargestCode<Stored> ? kLargestCode<Stored> : code;
      code = code < -kLargestCode<Stored> ? -kLargestCode<Stored> : code;
      encode(code, to + h);
    }
  }
}

template <class Isa, class Stored>
void write_token(const AttentionProblem& p, int token) {
  if (p.page[token] == 0) return;  // padding: nobody reads page 0
  for (int kv_head = 0; kv_head < p.K; kv_head++) {
    const int64_t index = slot_index(p, p.page[token], kv_head, p.slot[token]);
    const int64_t from = (static_cast<int64_t>(token) * p.K + kv_head) * p.H;
    auto put = [&](const float* x, void* pages, float* scales) {
      store_row<Isa>(x + from, p.H, static_cast<Stored*>(pages) + index * p.H, scales ? scales + index : nullptr);
    };
    put(p.k, p.k_pages, p.k_scale);
    put(p.v, p.v_pages, p.v_scale);
  }
}

}  // namespace
}  // namespace atoma
