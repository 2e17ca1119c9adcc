// How the codes of a tile lie in a block: 32 columns by 32 inputs, eight steps of four inputs.
//
// A block has as many words as a code has bits; a word is [32 columns][4 inputs] bytes, so that four inputs of a column
// lie together, as instructions for products of bytes want them.
//   8 bits: a word is a step
//   4 bits: a word is two steps, `word` in the low halves of its bytes and `word + 4` in the high ones
//   2 bits: a word is four steps, `word + 2f` in bits 2f and 2f + 1
//   6 and 5 bits: a word is a step, in the low bits of its bytes; the steps for which no words are left lie in the high
//     bits, spread over several words
//   3 bits: a word is two steps; the last two are spread likewise over the highest two bits
#pragma once

#include <array>
#include <cstdint>

namespace atoma {

inline constexpr int kTile = 32;   // columns
inline constexpr int kBlock = 32;  // inputs
inline constexpr int kSteps = 8;   // of a block

// Kinds that weights are stored in, by number as `native/matmul.py` gives them; `kBytes`, behind them, are what kernels
// make of spread codes for many rows: a code below 64 in each byte, laid out as 8 bits.
enum class Codes : int { kBits8, kBits4, kTable4, kBits2, kBits6, kBits5, kBits3, kBytes };
inline constexpr int kStoredCodes = 7;

constexpr int bits_of(Codes codes) {
  constexpr int bits[] = {8, 4, 4, 2, 6, 5, 3, 8};
  return bits[static_cast<int>(codes)];
}

// Whether some codes are spread over several bytes.
constexpr bool is_spread(Codes codes) { return 8 % bits_of(codes) != 0; }

// Bits of the codes of one step, and where they lie.
struct Field {
  int step;
  int shift;  // in a code
  int width;
  int word;
  int bit;  // in a byte of it
};

// All fields of a block, those of a step one behind the other. `quant/tile_fields.py` has the same.
template <int bits>
constexpr auto fields_of() {
  if constexpr (bits == 6) {
    return std::array<Field, 12>{{{0, 0, 6, 0, 0},
                                  {1, 0, 6, 1, 0},
                                  {2, 0, 6, 2, 0},
                                  {3, 0, 6, 3, 0},
                                  {4, 0, 6, 4, 0},
                                  {5, 0, 6, 5, 0},
                                  {6, 0, 2, 0, 6},
                                  {6, 2, 2, 1, 6},
                                  {6, 4, 2, 2, 6},
                                  {7, 0, 2, 3, 6},
                                  {7, 2, 2, 4, 6},
                                  {7, 4, 2, 5, 6}}};
  } else if constexpr (bits == 5) {
    return std::array<Field, 12>{{{0, 0, 5, 0, 0},
                                  {1, 0, 5, 1, 0},
                                  {2, 0, 5, 2, 0},
                                  {3, 0, 5, 3, 0},
                                  {4, 0, 5, 4, 0},
                                  {5, 0, 3, 0, 5},
                                  {5, 3, 2, 3, 6},
                                  {6, 0, 3, 1, 5},
                                  {6, 3, 2, 4, 6},
                                  {7, 0, 3, 2, 5},
                                  {7, 3, 1, 3, 5},
                                  {7, 4, 1, 4, 5}}};
  } else if constexpr (bits == 3) {
    return std::array<Field, 10>{{{0, 0, 3, 0, 0},
                                  {1, 0, 3, 0, 3},
                                  {2, 0, 3, 1, 0},
                                  {3, 0, 3, 1, 3},
                                  {4, 0, 3, 2, 0},
                                  {5, 0, 3, 2, 3},
                                  {6, 0, 2, 0, 6},
                                  {6, 2, 1, 2, 6},
                                  {7, 0, 2, 1, 6},
                                  {7, 2, 1, 2, 7}}};
  } else {
    std::array<Field, kSteps> fields{};
    for (int step = 0; step < kSteps; step++) fields[step] = {step, 0, bits, step % bits, step / bits * bits};
    return fields;
  }
}

// Calls run.template operator()<bits>() for a width of codes.
template <class Run>
constexpr auto for_bits(int bits, Run&& run) {
  switch (bits) {
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
    case 5:
      return run.template operator()<5>();
    case 6:
      return run.template operator()<6>();
    default:
      return run.template operator()<8>();
  }
}

// The code of input `k` and a column of a block.
inline int code_at(Codes kind, const uint8_t* block, int k, int column) {
  const int step = k / 4;
  const auto part = [&](const Field& field) {
    const int byte = block[(field.word * kTile + column) * 4 + k % 4];
    return (byte >> field.bit & ((1 << field.width) - 1)) << field.shift;
  };
  return for_bits(bits_of(kind), [&]<int bits>() {
    constexpr auto fields = fields_of<bits>();
    int code = part(fields[step]);  // the first of each step but, where they are spread, of the last two
    if constexpr (fields.size() > kSteps) {
      if (fields[step].step != step) code = 0;
      for (int i = step; i < static_cast<int>(fields.size()); i++) {
        if (fields[i].step == step) code |= part(fields[i]);
      }
    }
    return code;
  });
}

}  // namespace atoma
