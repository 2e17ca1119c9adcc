// x · Wᵀ for a weight [N, K] of quantized groups in tiles: the layout, and the functions that each variant compiles.
//
//   weight = scale · number − min,   number = code − zero, or table[code], or code − 128 of eight bits
//
// A tile is 32 rows of W, the columns of the product. Its codes come in blocks of 32 inputs, block by block (codes.h).
// Scales and mins lie [groups][32 columns] for each tile, in the type that holds them; integers have floats beside them,
// for supergroups. N is filled up to whole tiles and K to whole blocks with zeros.
//
// A row of the product depends on that row of x alone, and its sums are made in the same order for any number of rows
// and threads.
#pragma once

#include <cstdint>

#include "codes.h"
#include "rowwise.h"

namespace atoma {

enum class FactorType : int { kFloat32, kFloat16, kBfloat16, kInt8 };

constexpr int64_t size_of(FactorType type) {
  return type == FactorType::kFloat32 ? 4 : type == FactorType::kInt8 ? 1 : 2;
}

// How activations are rounded.
enum class Activations : int {
  kGroups = 0,     // int8 with a scale for each block
  kTwoPlanes = 1,  // the same, and what that leaves, times 254, as int8 again
  kTokens = 2,     // int8 with a scale for the whole row, as BitNet b1.58 was trained
  kExact = 3,      // not at all
};

// Scales or mins of one matrix.
struct Factors {
  const void* values = nullptr;  // null: there are none
  const float* supers = nullptr;
  FactorType type = FactorType::kFloat32;
  int64_t groups = 0;       // of a row of W
  int64_t supergroups = 0;  // likewise; 0 without supers
};

struct TiledWeight {
  const uint8_t* codes = nullptr;
  Factors scales, mins;
  Codes kind = Codes::kBits8;
  int64_t N = 0;
  int64_t blocks = 0;  // of a row of W
  int subs = 1;        // groups in a block: 2 where a group has 16 inputs
  int zero = 0;        // of codes of fewer bits than eight
  uint8_t table[16] = {};  // numbers + 128

  int64_t tiles() const { return (N + kTile - 1) / kTile; }
  int64_t tile_bytes() const { return blocks * block_bytes(); }
  int64_t block_bytes() const { return kTile * kBlock * bits_of(kind) / 8; }
};

// The number of row 32 · tile + column of W at input k.
inline int number_at(const TiledWeight& weight, int64_t tile, int64_t k, int column) {
  const uint8_t* block = weight.codes + tile * weight.tile_bytes() + k / kBlock * weight.block_bytes();
  const int code = code_at(weight.kind, block, static_cast<int>(k % kBlock), column);
  switch (weight.kind) {
    case Codes::kBits8:
      return code - 128;
    case Codes::kTable4:
      return weight.table[code] - 128;
    default:
      return code - weight.zero;
  }
}

// Rows of x, rounded: [rows][blocks]. All that a product reads of a block lies together: numbers [planes][32], their
// scale (of the finer plane, where there are two), and the sum of each part's numbers, the planes joined (whole, below 2^24).
struct RoundedRows {
  uint8_t* bytes;
  int64_t blocks;
  int subs;
  int planes;

  static constexpr int64_t block_bytes(int planes, int subs) { return planes * kBlock + (1 + subs) * int64_t{sizeof(float)}; }
  int64_t row_bytes() const { return blocks * block_bytes(planes, subs); }

  int8_t* numbers(int64_t row, int64_t block) const {
    return reinterpret_cast<int8_t*>(bytes + row * row_bytes() + block * block_bytes(planes, subs));
  }
  // Behind the numbers of a block: its scale, then its sums.
  static float* factors(int8_t* numbers, int planes) { return reinterpret_cast<float*>(numbers + planes * kBlock); }
  static const float* factors(const int8_t* numbers, int planes) {
    return reinterpret_cast<const float*>(numbers + planes * kBlock);
  }
};

// Rows of activations in front of a product. With a norm (rowwise.h), each is normed and then rounded at once: what that
// makes is never written.
struct Inputs {
  const float* rows;             // [rows, K]
  const float* scale = nullptr;  // [K] of the norm; null: there is none
  float eps = 0;                 // likewise
};

// What becomes of a product [rows, N] before it is written: at most one of both.
struct Outputs {
  float* rows;                      // [rows, N]; [rows, N / 2] behind a gate
  const float* residual = nullptr;  // [rows, N] that it is added to, which may be the same memory
  bool is_gated = false;            // the first half of its columns are gates, the last ups (rowwise.h)
  Gate gate = Gate::kSilu;
};

// Some blocks of a row of W.
struct Blocks {
  int64_t first, count;
};

// One variant's functions.
struct MatmulKernels {
  // Whether K numbers are all 0 or -0.
  bool (*is_zero)(const float* x, int64_t K);

  // Rounds K numbers to row `row` of `out`.
  void (*round_row)(const float* x, int64_t K, Activations how, const RoundedRows& out, int64_t row);

  // Rounds 32 numbers by themselves to block `block` of row `row`.
  void (*round_group)(const float* x, const RoundedRows& out, int64_t row, int64_t block);

  // Scales or mins of a tile as [blocks · subs][32] floats.
  void (*decode_factors)(const Factors& factors, int64_t tile, int64_t spread, float* out);

  // What some blocks of a tile add to y[rows][32], `ld` floats from row to row; the first blocks set it. `codes`,
  // `scales` and `mins` are of these blocks, factors decoded; `mins` may be null.
  void (*tile_product)(const TiledWeight& weight, const uint8_t* codes, const float* scales, const float* mins,
                       const RoundedRows& x, Blocks blocks, int64_t first_row, int64_t rows, float* y, int64_t ld);

  // Spread codes of `count` blocks, as `kBytes`.
  void (*join_codes)(Codes kind, const uint8_t* codes, int64_t count, uint8_t* out);

  // All of y for few rows, with factors as they are stored, which saves decoding them. False, and nothing done, where
  // this variant has no code for them or would be no faster for it.
  bool (*stored_tile_product)(const TiledWeight& weight, int64_t tile, const RoundedRows& x, int64_t first_row,
                              int64_t rows, float* y, int64_t ld);

  // The same with x as it is, [rows][K], K up to `blocks · 32`. `scratch` holds [blocks · 32][32] floats.
  void (*exact_tile_product)(const TiledWeight& weight, int64_t tile, const float* scales, const float* mins,
                             const float* x, int64_t K, int64_t rows, float* scratch, float* y, int64_t ld);
};

const MatmulKernels& matmul_kernels();  // of the active variant

// How many of the rows of x [rows, K] there are up to the last one that is not zeros.
int64_t rows_in_use(const float* x, int64_t rows, int64_t K);

// y [rows, N] = x [rows, K] · Wᵀ, and what becomes of that. The last rows of x, as far as they are zeros, cost nothing and
// give zeros: a step has as many rows as its program, filled up with them. Gates and ups must be whole tiles.
void matmul(const TiledWeight& weight, const Inputs& x, int64_t rows, int64_t K, Activations how, const Outputs& y);

// y [rows, N] = down · (gate(G · x) · (U · x)), and what that is added to, with the bits of two calls of `matmul`: `up` has
// the rows of G and then those of U, whole tiles. What the gate makes is rounded at once, group by group, and never
// written: `how` is kGroups or kTwoPlanes. `residual`, and x where it is that, may be the memory of y.
void gated_net(const TiledWeight& up, const TiledWeight& down, const Inputs& x, int64_t rows, int64_t K, Activations how,
               Gate gate, const float* residual, float* y);

// Rows `ids` of W, as floats [num_ids, K]. An id outside [0, N) gives NaN, as look-ups in XLA do.
void read_rows(const TiledWeight& weight, const int32_t* ids, int64_t num_ids, int64_t K, float* out);

}  // namespace atoma
