// The functions of matmul.h for one variant, `Isa`. Included by matmul_*.cc alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "factors.h"
#include "matmul.h"

namespace atoma {
namespace {

// Numbers below it count as zero: their reciprocal would overflow, and XLA flushes the smallest of them, too.
constexpr float kTiny = 0x1p-100f;
constexpr float kPlaneRatio = 254.0f;  // what the first plane leaves is at most half a step
constexpr int32_t kInfinityBits = 0x7f800000;

// Half to even, for |x| below 2^22: the sum has no bits left for a fraction.
template <class Isa>
typename Isa::Floats rounded(typename Isa::Floats x) {
  const auto magic = Isa::set(12582912.0f);  // 1.5 · 2^23
  return Isa::sub(Isa::add(x, magic), magic);
}

// The bits of the largest magnitude of n numbers, n a multiple of the lanes; from infinity on, one is not finite.
template <class Isa>
int32_t largest_bits(const float* x, int64_t n) {
  auto most = Isa::set(int32_t{0});
  for (int64_t i = 0; i < n; i += Isa::kLanes) most = Isa::max(most, Isa::magnitude_bits(Isa::load(x + i)));
  return Isa::largest(most);
}

inline float from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int32_t sum_of(const int8_t* values, int n) {
  int32_t sum = 0;
  for (int i = 0; i < n; i++) sum += values[i];
  return sum;
}

// Rounds one block. `factor` takes x to the integers, `scale` takes those of the last plane back.
template <class Isa>
void round_block(const float* x, float factor, float scale, const RoundedRows& out, int64_t row, int64_t block) {
  int8_t* coarse = out.row_values(row) + block * kBlock;
  int8_t* fine = coarse + out.blocks * kBlock;
  const auto by = Isa::set(factor);
  for (int i = 0; i < kBlock; i += Isa::kLanes) {
    const auto value = Isa::mul(Isa::load(x + i), by);
    const auto whole = rounded<Isa>(value);
    Isa::store_int8(coarse + i, whole);
    if (out.planes == 2) {
      Isa::store_int8(fine + i, rounded<Isa>(Isa::mul(Isa::sub(value, whole), Isa::set(kPlaneRatio))));
    }
  }
  out.row_scales(row)[block] = scale;
  const int width = kBlock / out.subs;
  for (int sub = 0; sub < out.subs; sub++) {
    int32_t sum = sum_of(coarse + sub * width, width);
    if (out.planes == 2) sum = 254 * sum + sum_of(fine + sub * width, width);
    out.row_sums(row)[block * out.subs + sub] = static_cast<float>(sum);
  }
}

// A block that holds NaN or infinity: the row shows it, and no other does.
inline void spoil_block(const RoundedRows& out, int64_t row, int64_t block) {
  for (int plane = 0; plane < out.planes; plane++) {
    std::memset(out.row_values(row) + (plane * out.blocks + block) * kBlock, 0, kBlock);
  }
  for (int sub = 0; sub < out.subs; sub++) out.row_sums(row)[block * out.subs + sub] = 0;
  out.row_scales(row)[block] = from_bits(0x7fc00000);  // NaN
}

template <class Isa>
bool is_zero(const float* x, int64_t K) {
  const int64_t whole = K / kBlock * kBlock;
  for (int64_t k = 0; k < whole; k += kBlock) {
    if (largest_bits<Isa>(x + k, kBlock) != 0) return false;
  }
  for (int64_t k = whole; k < K; k++) {
    if (x[k] != 0.0f) return false;
  }
  return true;
}

template <class Isa>
void round_row(const float* x, int64_t K, Activations how, const RoundedRows& out, int64_t row) {
  float token_factor = 0, token_scale = 0;
  bool token_is_finite = true;
  if (how == Activations::kTokens) {
    int32_t bits = largest_bits<Isa>(x, K / kBlock * kBlock);
    for (int64_t k = K / kBlock * kBlock; k < K; k++) {
      int32_t own;
      std::memcpy(&own, x + k, sizeof own);
      own &= 0x7fffffff;
      bits = own > bits ? own : bits;
    }
    token_is_finite = bits < kInfinityBits;
    const float largest = from_bits(bits);
    token_factor = 127.0f / (largest > 1e-5f ? largest : 1e-5f);
    token_scale = 1.0f / token_factor;
  }
  for (int64_t block = 0; block < out.blocks; block++) {
    const float* from = x + block * kBlock;
    float filled[kBlock];
    if ((block + 1) * kBlock > K) {
      std::memset(filled, 0, sizeof filled);
      std::memcpy(filled, from, (K - block * kBlock) * sizeof(float));
      from = filled;
    }
    if (how == Activations::kTokens) {
      if (token_is_finite) {
        round_block<Isa>(from, token_factor, token_scale, out, row, block);
      } else {
        spoil_block(out, row, block);
      }
      continue;
    }
    const int32_t bits = largest_bits<Isa>(from, kBlock);
    if (bits >= kInfinityBits) {
      spoil_block(out, row, block);
      continue;
    }
    const float largest = from_bits(bits);
    const float factor = largest > kTiny ? 127.0f / largest : 0.0f;
    const float scale = largest > kTiny ? largest / 127.0f : 0.0f;
    round_block<Isa>(from, factor, out.planes == 2 ? scale / kPlaneRatio : scale, out, row, block);
  }
}

// Field `at` of the bytes of four or two bits; whole bytes of eight.
template <class Isa, Codes kind, int at>
typename Isa::Bytes codes_of(typename Isa::Bytes bytes, typename Isa::Bytes table) {
  constexpr int bits = bits_of(kind);
  const auto codes = Isa::template field<bits * at, (1 << bits) - 1>(bytes);
  if constexpr (kind == Codes::kTable4) return Isa::look_up(table, codes);
  return codes;
}

template <class Isa, Codes kind>
struct ArithmeticOf {
  static constexpr bool kIsWide = kind == Codes::kBits8 || kind == Codes::kTable4;
  using Type = typename Isa::Small;
};
template <class Isa>
struct ArithmeticOf<Isa, Codes::kBits8> {
  static constexpr bool kIsWide = true;
  using Type = typename Isa::Wide;
};
template <class Isa>
struct ArithmeticOf<Isa, Codes::kTable4> {
  static constexpr bool kIsWide = true;
  using Type = typename Isa::Wide;
};

// How far ahead codes are asked for: the processor by itself keeps too few lines on their way. What lies behind the
// last tile may be asked for, too: that reads nothing.
constexpr int kLine = 64, kAhead = 4096;  // bytes

// `rows` rows of x by `vectors` vectors of columns, over all of K. `Reader` finds the factors of each block.
template <class Isa, Codes kind, int subs, int planes, int rows, int vectors, class Reader>
struct Product {
  using Arithmetic = typename ArithmeticOf<Isa, kind>::Type;
  using Sum = typename Arithmetic::Sum;
  static constexpr bool kIsWide = ArithmeticOf<Isa, kind>::kIsWide;
  static constexpr int kFields = 8 / bits_of(kind);
  static constexpr int kWords = 8 / kFields;  // steps that bytes of their own hold
  static constexpr int kWordBytes = kTile * 4;
  static constexpr int kBlockBytes = kWords * kWordBytes;
  static constexpr int kSplitFields = kFields >= subs ? kFields / subs : 1;  // of a sub-block
  static constexpr int kSplitWords = kFields >= subs ? kWords : kWords / subs;

  // Adds the products of one step, `word` and `at`, in the sums of all rows.
  template <int at>
  static inline __attribute__((always_inline)) void step(const typename Isa::Bytes (&bytes)[vectors],
                                                         typename Isa::Bytes table, const int8_t* x,
                                                         int64_t plane_stride, int64_t row_stride, int word,
                                                         Sum (&sums)[planes][rows][vectors]) {
    typename Arithmetic::Weights weights[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) weights[v] = Arithmetic::prepare(codes_of<Isa, kind, at>(bytes[v], table));
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
      for (int p = 0; p < planes; p++) {
        const auto four = Isa::repeat4(x + r * row_stride + p * plane_stride + 4 * (at * kWords + word));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[p][r][v] = Arithmetic::step(sums[p][r][v], weights[v], four);
      }
    }
  }

  template <int first, int count>
  static inline __attribute__((always_inline)) void steps(const typename Isa::Bytes (&bytes)[vectors],
                                                          typename Isa::Bytes table, const int8_t* x,
                                                          int64_t plane_stride, int64_t row_stride, int word,
                                                          Sum (&sums)[planes][rows][vectors]) {
    step<first>(bytes, table, x, plane_stride, row_stride, word, sums);
    if constexpr (count > 1) steps<first + 1, count - 1>(bytes, table, x, plane_stride, row_stride, word, sums);
  }

  template <int sub>
  static inline __attribute__((always_inline)) void sub_block(const uint8_t* codes, typename Isa::Bytes table,
                                                              const int8_t* x, int64_t plane_stride,
                                                              int64_t row_stride,
                                                              Sum (&sums)[planes][rows][vectors]) {
    constexpr int first_word = kFields >= subs ? 0 : sub * kSplitWords;
    constexpr int first_field = kFields >= subs ? sub * kSplitFields : 0;
#pragma GCC unroll 8
    for (int word = first_word; word < first_word + kSplitWords; word++) {
      typename Isa::Bytes bytes[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        bytes[v] = Isa::load_bytes(codes + word * kWordBytes + v * 4 * Isa::kLanes);
      }
      steps<first_field, kSplitFields>(bytes, table, x, plane_stride, row_stride, word, sums);
    }
  }

  // Adds scale · sum − min · Σx, times the activations' scale, to the floats of all rows.
  template <int sub, bool with_mins>
  static inline __attribute__((always_inline)) void scale(const Sum (&sums)[planes][rows][vectors],
                                                          const Reader& scales, const Reader& mins,
                                                          const float* x_scales, const float* x_sums, int64_t blocks,
                                                          int zero, typename Isa::Floats (&y)[rows][vectors]) {
    typename Isa::Floats w_scales[vectors], w_mins[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      w_scales[v] = scales.template load<sub>(v);
      if constexpr (with_mins) w_mins[v] = mins.template load<sub>(v);
    }
    const auto zeros = Isa::set(static_cast<float>(zero));
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const float* x_sum = x_sums + r * blocks * subs;
      const auto x_total = Isa::set(*x_sum);
      const auto x_scale = Isa::set(x_scales[r * blocks]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        auto sum = Arithmetic::finish(sums[0][r][v]);
        if constexpr (planes == 2) sum = Isa::join_planes(sum, Arithmetic::finish(sums[1][r][v]));
        if constexpr (kIsWide) {
          constexpr int32_t bias = Arithmetic::kBias;
          if constexpr (bias != 0) sum = Isa::sub(sum, Isa::set(bias * static_cast<int32_t>(*x_sum)));
        }
        auto part = Isa::to_float(sum);
        // Exact: codes below 16 keep all of these whole numbers below 2^24.
        if constexpr (!kIsWide) part = Isa::fnma(zeros, x_total, part);
        part = Isa::mul(part, w_scales[v]);
        if constexpr (with_mins) part = Isa::fnma(w_mins[v], x_total, part);
        y[r][v] = Isa::fma(x_scale, part, y[r][v]);
      }
    }
  }

  static void run(const TiledWeight& weight, const uint8_t* codes, Reader scales, Reader mins, const RoundedRows& x,
                  int64_t first_row, float* y, int64_t ld) {
    const int64_t plane_stride = x.blocks * kBlock, row_stride = planes * plane_stride;
    const int8_t* values = x.row_values(first_row);
    const float* x_scales = x.row_scales(first_row);
    const float* x_sums = x.row_sums(first_row);
    const auto table = Isa::load_table(weight.table);
    typename Isa::Floats out[rows][vectors];
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < vectors; v++) out[r][v] = Isa::set(0.0f);
    }
    for (int64_t block = 0; block < x.blocks; block++) {
      if constexpr (rows <= 2) {  // with more, memory keeps up
#pragma GCC unroll 16
        for (int at = 0; at < kBlockBytes; at += kLine) __builtin_prefetch(codes + kAhead + at);
      }
      one_sub<0>(codes, table, values, plane_stride, row_stride, scales, mins, x_scales, x_sums, x.blocks, weight.zero,
                 out);
      if constexpr (subs == 2) {
        one_sub<1>(codes, table, values, plane_stride, row_stride, scales, mins, x_scales, x_sums + 1, x.blocks,
                   weight.zero, out);
      }
      codes += kBlockBytes;
      values += kBlock;
      scales.next();
      if (mins.is_there()) mins.next();
      x_scales++;
      x_sums += subs;
    }
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < vectors; v++) Isa::store(y + r * ld + v * Isa::kLanes, out[r][v]);
    }
  }

  template <int sub>
  static inline __attribute__((always_inline)) void one_sub(
      const uint8_t* codes, typename Isa::Bytes table, const int8_t* x, int64_t plane_stride, int64_t row_stride,
      const Reader& scales, const Reader& mins, const float* x_scales, const float* x_sums, int64_t blocks, int zero,
      typename Isa::Floats (&out)[rows][vectors]) {
    Sum sums[planes][rows][vectors];
#pragma GCC unroll 2
    for (int p = 0; p < planes; p++) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[p][r][v] = Arithmetic::zero();
      }
    }
    sub_block<sub>(codes, table, x, plane_stride, row_stride, sums);
    if (mins.is_there()) {
      scale<sub, true>(sums, scales, mins, x_scales, x_sums, blocks, zero, out);
    } else {
      scale<sub, false>(sums, scales, mins, x_scales, x_sums, blocks, zero, out);
    }
  }
};

// All columns of a tile for `rows` rows. `scales` and `mins` make the readers, from the first column that each needs.
template <class Isa, Codes kind, int subs, int planes, int rows, class Reader, class Source>
void rows_product(const TiledWeight& weight, const uint8_t* codes, const Source& scales, const Source& mins,
                  const RoundedRows& x, int64_t first_row, float* y, int64_t ld) {
  constexpr int all = kTile / Isa::kLanes;
  constexpr int vectors = Isa::vectors(rows * planes);
  for (int v = 0; v < all; v += vectors) {
    const int column = v * Isa::kLanes;
    Product<Isa, kind, subs, planes, rows, vectors, Reader>::run(weight, codes + column * 4, Reader(scales, column),
                                                                 Reader(mins, column), x, first_row, y + column, ld);
  }
}

// All rows by one tile, at most `most` at once.
template <class Isa, Codes kind, int subs, int planes, int most, class Reader, class Source>
void tile_product_of(const TiledWeight& weight, int64_t tile, const Source& scales, const Source& mins,
                     const RoundedRows& x, int64_t row, int64_t rows, float* y, int64_t ld) {
  const uint8_t* codes = weight.codes + tile * weight.tile_bytes();
  if constexpr (most >= 4) {
    for (; rows >= 4; row += 4, rows -= 4, y += 4 * ld) {
      rows_product<Isa, kind, subs, planes, 4, Reader>(weight, codes, scales, mins, x, row, y, ld);
    }
  }
  if constexpr (most >= 2) {
    for (; rows >= 2; row += 2, rows -= 2, y += 2 * ld) {
      rows_product<Isa, kind, subs, planes, 2, Reader>(weight, codes, scales, mins, x, row, y, ld);
    }
  }
  for (; rows >= 1; row++, rows--, y += ld) {
    rows_product<Isa, kind, subs, planes, 1, Reader>(weight, codes, scales, mins, x, row, y, ld);
  }
}

// Calls run.template operator()<kind, subs>() for those of the weight.
template <class Run>
auto for_kind(const TiledWeight& weight, Run&& run) {
  const auto with_subs = [&]<Codes kind>() {
    if (weight.subs == 2) return run.template operator()<kind, 2>();
    return run.template operator()<kind, 1>();
  };
  switch (weight.kind) {
    case Codes::kBits8:
      return with_subs.template operator()<Codes::kBits8>();
    case Codes::kBits4:
      return with_subs.template operator()<Codes::kBits4>();
    case Codes::kTable4:
      return with_subs.template operator()<Codes::kTable4>();
    default:
      return with_subs.template operator()<Codes::kBits2>();
  }
}

template <class Isa>
void tile_product(const TiledWeight& weight, int64_t tile, const float* scales, const float* mins,
                  const RoundedRows& x, int64_t row, int64_t rows, float* y, int64_t ld) {
  for_kind(weight, [&]<Codes kind, int subs>() {
    using Reader = DecodedFactors<Isa, subs>;
    const auto with = [&]<int planes>() {
      tile_product_of<Isa, kind, subs, planes, Isa::kMaxRows / planes, Reader>(weight, tile, scales, mins, x, row, rows,
                                                                               y, ld);
    };
    x.planes == 2 ? with.template operator()<2>() : with.template operator()<1>();
  });
}

// What `stored_tile_product` has code for: llama.cpp's formats, and the float32 factors of GPTQ and AWQ. All that could
// be would take as long to compile as the rest of this file.
template <Codes kind, int subs, FactorType type>
constexpr bool has_stored_product() {
  if (type == FactorType::kFloat32) return kind == Codes::kBits4 && subs == 1;
  if (type == FactorType::kFloat16) return subs == 1;
  if (kind == Codes::kTable4) return subs == 1;
  if (kind == Codes::kBits2) return subs == 2;
  return type == FactorType::kInt8;
}

template <class Isa>
bool stored_tile_product(const TiledWeight& weight, int64_t tile, const RoundedRows& x, int64_t row, int64_t rows,
                         float* y, int64_t ld) {
  if constexpr (Isa::kStoredRows > 0) {
    if (rows > Isa::kStoredRows || x.planes != 1 || !lie_as_read(weight)) return false;
    const StoredTile scales(weight.scales, weight, tile), mins(weight.mins, weight, tile);
    const auto with = [&]<FactorType type, bool with_supers>() {
      return for_kind(weight, [&]<Codes kind, int subs>() {
        if constexpr (has_stored_product<kind, subs, type>()) {
          using Reader = StoredFactors<Isa, type, with_supers, subs>;
          tile_product_of<Isa, kind, subs, 1, Isa::kStoredRows, Reader>(weight, tile, scales, mins, x, row, rows, y, ld);
          return true;
        }
        return false;
      });
    };
    const FactorType type = weight.scales.type;
    if (weight.scales.supers != nullptr) {
      return type == FactorType::kInt8 && with.template operator()<FactorType::kInt8, true>();
    }
    if (type == FactorType::kFloat16) return with.template operator()<FactorType::kFloat16, false>();
    if (type == FactorType::kFloat32) return with.template operator()<FactorType::kFloat32, false>();
  }
  return false;
}

template <class Isa>
void exact_tile_product(const TiledWeight& weight, int64_t tile, const float* scales, const float* mins,
                        const float* x, int64_t K, int64_t rows, float* scratch, float* y, int64_t ld) {
  for (int64_t k = 0; k < K; k++) {
    const int64_t group = k / (kBlock / weight.subs);
    for (int column = 0; column < kTile; column++) {
      float value = scales[group * kTile + column] * static_cast<float>(number_at(weight, tile, k, column));
      if (mins != nullptr) value -= mins[group * kTile + column];
      scratch[k * kTile + column] = value;
    }
  }
  constexpr int vectors = kTile / Isa::kLanes;
  for (int64_t row = 0; row < rows; row++) {
    typename Isa::Floats sums[vectors];
    for (auto& sum : sums) sum = Isa::set(0.0f);
    for (int64_t k = 0; k < K; k++) {
      const auto value = Isa::set(x[row * K + k]);
      for (int v = 0; v < vectors; v++) {
        sums[v] = Isa::fma(value, Isa::load(scratch + k * kTile + v * Isa::kLanes), sums[v]);
      }
    }
    for (int v = 0; v < vectors; v++) Isa::store(y + row * ld + v * Isa::kLanes, sums[v]);
  }
}

template <class Isa>
constexpr MatmulKernels matmul_kernels_of() {
  return {is_zero<Isa>,      round_row<Isa>,           decode_factors<Isa>,
          tile_product<Isa>, stored_tile_product<Isa>, exact_tile_product<Isa>};
}

}  // namespace
}  // namespace atoma
