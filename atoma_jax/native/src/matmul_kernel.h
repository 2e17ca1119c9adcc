// The functions of matmul.h for one variant, `Isa`. Included by matmul_*.cc alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "factors.h"
#include "matmul.h"

namespace atoma {
namespace {

// Numbers below it count as zero: their reciprocal would overflow, and XLA flushes the smallest of them, too.
constexpr float kTiny = 0x1p-100f;
constexpr float kPlaneRatio = 254.0f;  // what the first plane leaves is at most half a step; of Isa::join_planes, too
constexpr int32_t kInfinityBits = 0x7f800000;

// Calls run.template operator()<subs>() for the groups in a block.
template <class Run>
auto for_subs(int subs, Run&& run) {
  return subs == 2 ? run.template operator()<2>() : run.template operator()<1>();
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

// Rounds one block. `factor` takes x to the integers, `scale` takes those of the last plane back.
template <class Isa, int subs, int planes>
void round_block(const float* x, float factor, float scale, int8_t* out) {
  constexpr int vectors = kBlock / Isa::kLanes;
  typename Isa::Ints whole[vectors], rest[vectors];
#pragma GCC unroll 8
  for (int i = 0; i < vectors; i++) {
    const auto value = Isa::mul(Isa::load(x + i * Isa::kLanes), Isa::set(factor));
    whole[i] = Isa::rounded(value);
    if constexpr (planes == 2) {
      rest[i] = Isa::rounded(Isa::mul(Isa::sub(value, Isa::to_float(whole[i])), Isa::set(kPlaneRatio)));
    }
  }
  Isa::store_int8(out, whole);
  if constexpr (planes == 2) {
    Isa::store_int8(out + kBlock, rest);
#pragma GCC unroll 8
    for (int i = 0; i < vectors; i++) whole[i] = Isa::join_planes(whole[i], rest[i]);
  }
  float* factors = RoundedRows::factors(out, planes);
  factors[0] = scale;
#pragma GCC unroll 2
  for (int sub = 0; sub < subs; sub++) {
    auto sum = Isa::set(int32_t{0});
#pragma GCC unroll 8
    for (int i = sub * vectors / subs; i < (sub + 1) * vectors / subs; i++) sum = Isa::add(sum, whole[i]);
    factors[1 + sub] = static_cast<float>(Isa::total(sum));
  }
}

// A block that holds NaN or infinity: the row shows it, and no other does.
template <int subs, int planes>
void spoil_block(int8_t* out) {
  std::memset(out, 0, RoundedRows::block_bytes(planes, subs));
  *RoundedRows::factors(out, planes) = from_bits(0x7fc00000);  // NaN
}

// Rounds one block by itself.
template <class Isa, int subs, int planes>
void round_group_of(const float* x, int8_t* out) {
  const int32_t bits = largest_bits<Isa>(x, kBlock);
  if (bits >= kInfinityBits) return spoil_block<subs, planes>(out);
  const float largest = from_bits(bits);
  const float factor = largest > kTiny ? 127.0f / largest : 0.0f;
  const float scale = largest > kTiny ? largest / 127.0f : 0.0f;
  round_block<Isa, subs, planes>(x, factor, planes == 2 ? scale / kPlaneRatio : scale, out);
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

template <class Isa, int subs, int planes>
void round_row_of(const float* x, int64_t K, Activations how, const RoundedRows& out, int64_t row) {
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
    int8_t* to = out.numbers(row, block);
    if (how != Activations::kTokens) {
      round_group_of<Isa, subs, planes>(from, to);
    } else if (token_is_finite) {
      round_block<Isa, subs, planes>(from, token_factor, token_scale, to);
    } else {
      spoil_block<subs, planes>(to);
    }
  }
}

template <class Isa>
void round_group(const float* x, const RoundedRows& out, int64_t row, int64_t block) {
  for_subs(out.subs, [&]<int subs>() {
    int8_t* to = out.numbers(row, block);
    out.planes == 2 ? round_group_of<Isa, subs, 2>(x, to) : round_group_of<Isa, subs, 1>(x, to);
  });
}

template <class Isa>
void round_row(const float* x, int64_t K, Activations how, const RoundedRows& out, int64_t row) {
  for_subs(out.subs, [&]<int subs>() {
    out.planes == 2 ? round_row_of<Isa, subs, 2>(x, K, how, out, row) : round_row_of<Isa, subs, 1>(x, K, how, out, row);
  });
}

constexpr int kWordBytes = kTile * 4;

// Field number i of a block, where its bits lie in codes.
template <class Isa, int bits, int i>
inline __attribute__((always_inline)) typename Isa::Bytes field_of(const uint8_t* block) {
  constexpr Field field = fields_of<bits>()[i];
  static_assert(field.bit >= field.shift);
  constexpr int mask = ((1 << field.width) - 1) << field.shift;
  return Isa::template field<field.bit - field.shift, mask>(Isa::load_bytes(block + field.word * kWordBytes));
}

// The number of a step's first field, which is one behind the last of the step before.
constexpr int first_field_of(int bits, int step) {
  return for_bits(bits, [&]<int own>() {
    int i = 0;
    for (const Field& field : fields_of<own>()) i += field.step < step;
    return i;
  });
}

// The codes of one step, of the columns from `block` on.
template <class Isa, int bits, int step>
inline __attribute__((always_inline)) typename Isa::Bytes codes_of(const uint8_t* block) {
  constexpr int first = first_field_of(bits, step), count = first_field_of(bits, step + 1) - first;
  static_assert(count >= 1 && count <= 3);
  auto codes = field_of<Isa, bits, first>(block);
  if constexpr (count > 1) codes = Isa::either(codes, field_of<Isa, bits, first + 1>(block));
  if constexpr (count > 2) codes = Isa::either(codes, field_of<Isa, bits, first + 2>(block));
  return codes;
}

constexpr bool is_wide(Codes kind) { return kind == Codes::kBits8 || kind == Codes::kTable4; }
constexpr bool is_medium(Codes kind) { return kind == Codes::kBytes || is_spread(kind); }

// How the products of a kind of codes are summed up.
template <class Isa, Codes kind>
constexpr auto arithmetic_of() {
  if constexpr (is_wide(kind)) {
    return typename Isa::Wide();
  } else if constexpr (is_medium(kind)) {
    return typename Isa::Medium();
  } else {
    return typename Isa::Small();
  }
}

// How far ahead codes are asked for: the processor by itself keeps too few lines on their way. What lies behind the
// last tile may be asked for, too: that reads nothing.
constexpr int kLine = 64, kAhead = 4096;  // bytes

// What is taken off a weight's codes and numbers. Known as the code is compiled, where registers are few and rows many:
// with several ends in one loop sums do not stay in registers. `kAsked`: as it runs.
enum class Terms { kNone, kMins, kZero, kBoth, kAsked };

// `rows` rows of x by `vectors` vectors of columns, over all of K. `Reader` finds the factors of each block.
template <class Isa, Codes kind, int subs, int planes, int rows, int vectors, class Reader>
struct Product {
  using Arithmetic = decltype(arithmetic_of<Isa, kind>());
  using Sum = typename Arithmetic::Sum;
  static constexpr bool kIsWide = is_wide(kind), kIsMedium = is_medium(kind);
  static constexpr int kOwnSteps = kBlock / 4 / subs;  // of a sub-block
  static constexpr int kStepsAtOnce = kIsMedium ? 2 : 1;
  // Vectors of columns that are summed up together: two steps at once need twice the registers for weights.
  static constexpr int kAtOnce = kIsMedium && vectors > 2 ? 2 : vectors;
  static constexpr int kBlockBytes = bits_of(kind) * kWordBytes;
  static constexpr int64_t kRoundedBytes = RoundedRows::block_bytes(planes, subs);  // of a block of x

  // Number i of the steps of a sub-block: word after word, all that a word has of it.
  static constexpr int step_at(int sub, int i) {
    if (is_spread(kind)) return sub * kOwnSteps + i;
    const int words = bits_of(kind), fields = 8 / words;
    const int own = fields >= subs ? fields / subs : 1;  // of a word's steps
    const int first_word = fields >= subs ? 0 : sub * kOwnSteps, first_field = fields >= subs ? sub * own : 0;
    return (first_field + i % own) * words + first_word + i / own;
  }

  template <int step>
  static inline __attribute__((always_inline)) typename Isa::Bytes numbers(const uint8_t* codes,
                                                                           typename Isa::Bytes table) {
    const auto own = codes_of<Isa, bits_of(kind), step>(codes);
    if constexpr (kind == Codes::kTable4) return Isa::look_up(table, own);
    return own;
  }

  // Adds the products of step number i, and of the next where two are taken at once, in the sums of all rows.
  template <int sub, int i>
  static inline __attribute__((always_inline)) void step(const uint8_t* codes, typename Isa::Bytes table,
                                                          const int8_t* x, int64_t row_stride,
                                                          Sum (&sums)[planes][rows][kAtOnce]) {
    constexpr int first = step_at(sub, i), second = step_at(sub, i + 1);
    typename Arithmetic::Weights weights[kAtOnce], more[kAtOnce];
#pragma GCC unroll 4
    for (int v = 0; v < kAtOnce; v++) {
      const uint8_t* from = codes + v * 4 * Isa::kLanes;
      weights[v] = Arithmetic::prepare(numbers<first>(from, table));
      if constexpr (kIsMedium) more[v] = Arithmetic::prepare(numbers<second>(from, table));
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
      for (int p = 0; p < planes; p++) {
        const int8_t* values = x + r * row_stride + p * kBlock;
        const auto four = Isa::repeat4(values + 4 * first);
        if constexpr (kIsMedium) {
          const auto next = Isa::repeat4(values + 4 * second);
#pragma GCC unroll 4
          for (int v = 0; v < kAtOnce; v++) {
            sums[p][r][v] = Arithmetic::two_steps(sums[p][r][v], weights[v], four, more[v], next);
          }
        } else {
#pragma GCC unroll 4
          for (int v = 0; v < kAtOnce; v++) sums[p][r][v] = Arithmetic::step(sums[p][r][v], weights[v], four);
        }
      }
    }
  }

  template <int sub, int... i>
  static inline __attribute__((always_inline)) void all_steps(std::integer_sequence<int, i...>, const uint8_t* codes,
                                                              typename Isa::Bytes table, const int8_t* x,
                                                              int64_t row_stride,
                                                              Sum (&sums)[planes][rows][kAtOnce]) {
    (step<sub, i * kStepsAtOnce>(codes, table, x, row_stride, sums), ...);
  }

  // Adds scale · (sum − zero · Σx) − min · Σx, times the activations' scale, to the floats of all rows.
  template <int sub, Terms terms, int first>
  static inline __attribute__((always_inline)) void scale(const Sum (&sums)[planes][rows][kAtOnce],
                                                          const Reader& scales, const Reader& mins,
                                                          const int8_t* x, int64_t row_stride, int zero,
                                                          typename Isa::Floats (&y)[rows][vectors]) {
    constexpr bool with_mins = terms == Terms::kMins || terms == Terms::kBoth;
    constexpr bool with_zero = terms == Terms::kZero || terms == Terms::kBoth;
    typename Isa::Floats w_scales[kAtOnce], w_mins[kAtOnce];
#pragma GCC unroll 4
    for (int v = 0; v < kAtOnce; v++) {
      w_scales[v] = scales.template load<sub>(first + v);
      if constexpr (with_mins) w_mins[v] = mins.template load<sub>(first + v);
    }
    const auto zeros = Isa::set(static_cast<float>(zero));
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const float* x_factors = RoundedRows::factors(x + r * row_stride, planes);
      const auto x_scale = Isa::set(x_factors[0]);
      const auto x_total = Isa::set(x_factors[1 + sub]);
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; v++) {
        auto sum = Arithmetic::finish(sums[0][r][v]);
        if constexpr (planes == 2) sum = Isa::join_planes(sum, Arithmetic::finish(sums[1][r][v]));
        if constexpr (kIsWide) {
          constexpr int32_t bias = Arithmetic::kBias;
          if constexpr (bias != 0) sum = Isa::sub(sum, Isa::set(bias * static_cast<int32_t>(x_factors[1 + sub])));
        }
        auto part = Isa::to_float(sum);
        // Exact but for codes of more than four bits and two planes: else all of these are whole numbers below 2^24.
        if constexpr (with_zero) part = Isa::fnma(zeros, x_total, part);
        part = Isa::mul(part, w_scales[v]);
        if constexpr (with_mins) part = Isa::fnma(w_mins[v], x_total, part);
        y[r][first + v] = Isa::fma(x_scale, part, y[r][first + v]);
      }
    }
  }

  // Calls run.template operator()<terms>() for those of a weight.
  template <class Run>
  static inline __attribute__((always_inline)) void with_terms(bool with_mins, int zero, Run&& run) {
    if (!with_mins) {
      run.template operator()<kIsWide ? Terms::kNone : Terms::kZero>();
    } else if (kIsWide || zero == 0) {
      run.template operator()<Terms::kMins>();
    } else {
      run.template operator()<kIsWide ? Terms::kMins : Terms::kBoth>();
    }
  }

  // `all_scales` and `all_mins` make the readers, from the first column that is read. (As arguments they would be copied.)
  template <class Source>
  static void run(const TiledWeight& weight, const uint8_t* codes, const Source& all_scales, const Source& all_mins,
                  int column, const RoundedRows& x, Blocks blocks, int64_t first_row, float* y, int64_t ld) {
    Reader scales(all_scales, column), mins(all_mins, column);
    const int64_t row_stride = x.blocks * kRoundedBytes;
    const int8_t* numbers = x.numbers(first_row, blocks.first);
    const auto table = Isa::load_table(weight.table);
    typename Isa::Floats out[rows][vectors];
    const bool is_first = blocks.first == 0;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        out[r][v] = is_first ? Isa::set(0.0f) : Isa::load(y + r * ld + v * Isa::kLanes);
      }
    }
    const auto all_blocks = [&]<Terms terms>() __attribute__((always_inline)) {
      for (int64_t block = 0; block < blocks.count; block++) {
        if constexpr (rows <= 2) {  // with more, memory keeps up
#pragma GCC unroll 16
          for (int at = 0; at < kBlockBytes; at += kLine) __builtin_prefetch(codes + kAhead + at);
        }
        one_sub<0, terms>(codes, table, numbers, row_stride, scales, mins, weight.zero, out);
        if constexpr (subs == 2) {
          one_sub<1, terms>(codes, table, numbers, row_stride, scales, mins, weight.zero, out);
        }
        codes += kBlockBytes;
        numbers += kRoundedBytes;
        scales.next();
        if (mins.is_there()) mins.next();
      }
    };
    if constexpr (rows < 4 || Isa::kRegisters > 16) {  // not worth the code
      all_blocks.template operator()<Terms::kAsked>();
    } else {
      with_terms(mins.is_there(), weight.zero, all_blocks);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) Isa::store(y + r * ld + v * Isa::kLanes, out[r][v]);
    }
  }

  template <int sub, Terms terms, int first = 0>
  static inline __attribute__((always_inline)) void one_sub(
      const uint8_t* codes, typename Isa::Bytes table, const int8_t* x, int64_t row_stride, const Reader& scales,
      const Reader& mins, int zero, typename Isa::Floats (&out)[rows][vectors]) {
    Sum sums[planes][rows][kAtOnce];
#pragma GCC unroll 2
    for (int p = 0; p < planes; p++) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < kAtOnce; v++) sums[p][r][v] = Arithmetic::zero();
      }
    }
    all_steps<sub>(std::make_integer_sequence<int, kOwnSteps / kStepsAtOnce>(), codes + first * 4 * Isa::kLanes, table,
                   x, row_stride, sums);
    const auto with = [&]<Terms own>() __attribute__((always_inline)) {
      scale<sub, own, first>(sums, scales, mins, x, row_stride, zero, out);
    };
    if constexpr (terms == Terms::kAsked) {
      with_terms(mins.is_there(), zero, with);
    } else {
      with.template operator()<terms>();
    }
    constexpr int next = first + kAtOnce;
    if constexpr (next < vectors) {
      one_sub<sub, terms, next>(codes, table, x, row_stride, scales, mins, zero, out);
    }
  }
};

// All columns of a tile for `rows` rows.
template <class Isa, Codes kind, int subs, int planes, int rows, class Reader, class Source>
void rows_product(const TiledWeight& weight, const uint8_t* codes, const Source& scales, const Source& mins,
                  const RoundedRows& x, Blocks blocks, int64_t first_row, float* y, int64_t ld) {
  constexpr int all = kTile / Isa::kLanes;
  constexpr int vectors = Isa::vectors(rows * planes);
  for (int v = 0; v < all; v += vectors) {
    const int column = v * Isa::kLanes;
    Product<Isa, kind, subs, planes, rows, vectors, Reader>::run(weight, codes + column * 4, scales, mins, column, x,
                                                                 blocks, first_row, y + column, ld);
  }
}

// All rows by blocks of one tile, at most `most` at once.
template <class Isa, Codes kind, int subs, int planes, int most, class Reader, class Source>
void tile_product_of(const TiledWeight& weight, const uint8_t* codes, const Source& scales, const Source& mins,
                     const RoundedRows& x, Blocks blocks, int64_t row, int64_t rows, float* y, int64_t ld) {
  if constexpr (most >= 6) {
    for (; rows >= 6; row += 6, rows -= 6, y += 6 * ld) {
      rows_product<Isa, kind, subs, planes, 6, Reader>(weight, codes, scales, mins, x, blocks, row, y, ld);
    }
  }
  if constexpr (most >= 4) {
    for (; rows >= 4; row += 4, rows -= 4, y += 4 * ld) {
      rows_product<Isa, kind, subs, planes, 4, Reader>(weight, codes, scales, mins, x, blocks, row, y, ld);
    }
  }
  if constexpr (most >= 2) {
    for (; rows >= 2; row += 2, rows -= 2, y += 2 * ld) {
      rows_product<Isa, kind, subs, planes, 2, Reader>(weight, codes, scales, mins, x, blocks, row, y, ld);
    }
  }
  for (; rows >= 1; row++, rows--, y += ld) {
    rows_product<Isa, kind, subs, planes, 1, Reader>(weight, codes, scales, mins, x, blocks, row, y, ld);
  }
}

// Calls run.template operator()<kind>() for that of the weight.
template <class Run>
auto for_kind(Codes kind, Run&& run) {
  switch (kind) {
    case Codes::kBits8:
      return run.template operator()<Codes::kBits8>();
    case Codes::kBits4:
      return run.template operator()<Codes::kBits4>();
    case Codes::kTable4:
      return run.template operator()<Codes::kTable4>();
    case Codes::kBits2:
      return run.template operator()<Codes::kBits2>();
    case Codes::kBits6:
      return run.template operator()<Codes::kBits6>();
    case Codes::kBits5:
      return run.template operator()<Codes::kBits5>();
    case Codes::kBits3:
      return run.template operator()<Codes::kBits3>();
    case Codes::kBytes:
      return run.template operator()<Codes::kBytes>();
  }
  __builtin_unreachable();
}

// The codes of a vector of columns of a block, from one step on.
template <class Isa, int bits, int step = 0>
void join_steps(const uint8_t* codes, uint8_t* out) {
  Isa::store_bytes(out + step * kWordBytes, codes_of<Isa, bits, step>(codes));
  if constexpr (step + 1 < kSteps) join_steps<Isa, bits, step + 1>(codes, out);
}

template <class Isa>
void join_codes(Codes kind, const uint8_t* codes, int64_t count, uint8_t* out) {
  for_bits(bits_of(kind), [&]<int bits>() {
    for (int64_t block = 0; block < count; block++) {
      const uint8_t* from = codes + block * bits * kWordBytes;
      uint8_t* to = out + block * kSteps * kWordBytes;
      if constexpr (8 % bits != 0) {
        for (int v = 0; v < kWordBytes; v += 4 * Isa::kLanes) join_steps<Isa, bits>(from + v, to + v);
      }
    }
  });
}

template <class Isa>
void tile_product(const TiledWeight& weight, const uint8_t* codes, const float* scales, const float* mins,
                  const RoundedRows& x, Blocks blocks, int64_t row, int64_t rows, float* y, int64_t ld) {
  for_kind(weight.kind, [&]<Codes kind>() {
    if constexpr (!is_spread(kind)) {
      for_subs(weight.subs, [&]<int subs>() {
        using Reader = DecodedFactors<Isa, subs>;
        constexpr int most = decltype(arithmetic_of<Isa, kind>())::kMaxRows;
        const auto with = [&]<int planes>() {
          tile_product_of<Isa, kind, subs, planes, most / planes, Reader>(weight, codes, scales, mins, x, blocks, row, rows,
                                                                          y, ld);
        };
        x.planes == 2 ? with.template operator()<2>() : with.template operator()<1>();
      });
    }
  });
}

// What `stored_tile_product` has code for: llama.cpp's formats, and the float32 factors of GPTQ and AWQ. All that could
// be would take as long to compile as the rest of this file.
template <Codes kind, int subs, FactorType type>
constexpr bool has_stored_product() {
  constexpr bool half_blocks = kind == Codes::kBits6 || kind == Codes::kBits3;  // Q6_K, Q3_K
  if (kind == Codes::kBytes) return false;
  if (type == FactorType::kFloat32) return kind == Codes::kBits4 && subs == 1;
  if (type == FactorType::kFloat16) return subs == 1 && !half_blocks;
  if (type != FactorType::kInt8) return false;
  if (kind == Codes::kBits8 || kind == Codes::kBits4) return true;
  return half_blocks || kind == Codes::kBits2 ? subs == 2 : subs == 1;
}

template <class Isa>
bool stored_tile_product(const TiledWeight& weight, int64_t tile, const RoundedRows& x, int64_t row, int64_t rows,
                         float* y, int64_t ld) {
  if constexpr (Isa::kStoredRows > 0) {
    if (rows > Isa::kStoredRows || x.planes != 1 || !lie_as_read(weight)) return false;
    const StoredTile scales(weight.scales, weight, tile), mins(weight.mins, weight, tile);
    const uint8_t* codes = weight.codes + tile * weight.tile_bytes();
    const Blocks all{0, weight.blocks};
    const auto with = [&]<FactorType type, bool with_supers>() {
      return for_kind(weight.kind, [&]<Codes kind>() {
        return for_subs(weight.subs, [&]<int subs>() {
          if constexpr (has_stored_product<kind, subs, type>()) {
            using Reader = StoredFactors<Isa, type, with_supers, subs>;
            tile_product_of<Isa, kind, subs, 1, Isa::kStoredRows, Reader>(weight, codes, scales, mins, x, all, row,
                                                                          rows, y, ld);
            return true;
          }
          return false;
        });
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
  return {is_zero<Isa>,      round_row<Isa>,  round_group<Isa>,           decode_factors<Isa>,
          tile_product<Isa>, join_codes<Isa>, stored_tile_product<Isa>, exact_tile_product<Isa>};
}

}  // namespace
}  // namespace atoma
