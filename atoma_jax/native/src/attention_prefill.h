// Prefill: a tile of queries of one sequence, and of one kv head, against its context. For one instruction set, see
// `float_vectors.h`.
//
// Queries lie side by side in vectors: [H, kTile]. So each number of K and V is read once for all of them, the softmax
// needs no sums across a vector, and K and V are used as they lie. The context is read in chunks at multiples of kChunk
// with a running softmax (flash attention, arXiv:2205.14135); a masked token adds exactly nothing, so that a query's
// result does not depend on the tile or the chunk of a prompt that it is in.
#pragma once

#include "attention_decode.h"
#include "float_vectors.h"
#include "kv_rows.h"
#include "paged_attention.h"

namespace atoma {
namespace {

// Each array of a tile, in a thread's scratch memory.
struct Tile {
  float* queries;  // [H, kTile], scaled
  float* sums;     // [H, kTile], of weighted V
  float* weights;  // [kChunk, kTile]: logits, then weights
  float* newest;   // [kTile] newest position that a query sees, as a float: exact up to 2^24
  float* oldest;   // [kTile]
  float* largest;  // [kTile] logit so far
  float* total;    // [kTile] sum of weights
  float* decay;    // [kTile] what the last chunk made of the sums before it
  float* k_rows;   // [kChunk, H], where the cache holds other types than float
  float* v_rows;
  int used;  // columns

  Tile(const AttentionProblem& p, int used, float* scratch) : used(used) {
    auto take = [&](int64_t floats) {
      float* taken = scratch;
      scratch += floats;
      return taken;
    };
    queries = take(p.H * kTile);
    sums = take(p.H * kTile);
    weights = take(kChunk * kTile);
    newest = take(kTile);
    oldest = take(kTile);
    largest = take(kTile);
    total = take(kTile);
    decay = take(kTile);
    k_rows = take(static_cast<int64_t>(kChunk) * p.H);
    v_rows = take(static_cast<int64_t>(kChunk) * p.H);
  }
};

// acc[i][·] of the microkernels: Rows × 3 vectors of columns fill the registers.
template <class Isa>
constexpr int kRows = Isa::kWidth == 16 ? 8 : 4;

// Logits of Rows tokens and 3 vectors of columns.
template <class Isa, int Rows>
inline void tile_logits(const float* queries, const float* const* k, int H, float* to) {
  using V = typename Isa::V;
  constexpr int W = Isa::kWidth;
  V acc[Rows][3];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++) acc[i][0] = acc[i][1] = acc[i][2] = Isa::zero();
  for (int h = 0; h < H; h++, queries += kTile) {
    const V x0 = Isa::load(queries), x1 = Isa::load(queries + W), x2 = Isa::load(queries + 2 * W);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; i++) {
      const V key = Isa::set1(k[i][h]);
      acc[i][0] = Isa::fma(key, x0, acc[i][0]);
      acc[i][1] = Isa::fma(key, x1, acc[i][1]);
      acc[i][2] = Isa::fma(key, x2, acc[i][2]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 16
    for (int j = 0; j < 3; j++) Isa::store(to + i * kTile + j * W, acc[i][j]);
}

// sums = decay · sums + weights · V, for Rows dimensions from h on and 3 vectors of columns.
template <class Isa, int Rows>
inline void tile_sums(
    const float* weights, const float* const* v, int count, int h, const float* decay, float* sums) {
  using V = typename Isa::V;
  constexpr int W = Isa::kWidth;
  V acc[Rows][3];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 16
    for (int j = 0; j < 3; j++) acc[i][j] = Isa::load(sums + i * kTile + j * W) * Isa::load(decay + j * W);
  for (int c = 0; c < count; c++, weights += kTile) {
    const V x0 = Isa::load(weights), x1 = Isa::load(weights + W), x2 = Isa::load(weights + 2 * W);
    const float* row = v[c] + h;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; i++) {
      const V value = Isa::set1(row[i]);
      acc[i][0] = Isa::fma(value, x0, acc[i][0]);
      acc[i][1] = Isa::fma(value, x1, acc[i][1]);
      acc[i][2] = Isa::fma(value, x2, acc[i][2]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 16
    for (int j = 0; j < 3; j++) Isa::store(sums + i * kTile + j * W, acc[i][j]);
}

// Running softmax of one vector of columns over `count` tokens from `at` on.
template <class Isa>
inline void tile_weights(const Tile& tile, int column, int at, int count, bool masked, float softcap) {
  using V = typename Isa::V;
  float* weights = tile.weights + column;
  const V newest = Isa::load(tile.newest + column), oldest = Isa::load(tile.oldest + column);
  const V before = Isa::load(tile.largest + column);
  V top = before;
  for (int c = 0; c < count; c++) {
    V x = Isa::load(weights + c * kTile);
    if (softcap != 0) x = softcap * tanh<Isa>(x / softcap);
    if (masked) x = Isa::within(Isa::set1(static_cast<float>(at + c)), oldest, newest, x, Isa::set1(-INFINITY));
    if (softcap != 0 || masked) Isa::store(weights + c * kTile, x);
    top = Isa::max(x, top);  // passes over NaN, which then shows in the sum
  }
  V sum = Isa::zero();
  for (int c = 0; c < count; c++) {
    const V x = exp<Isa>(Isa::load(weights + c * kTile) - top);
    sum += x;
    Isa::store(weights + c * kTile, x);
  }
  const V decay = exp<Isa>(before - top);
  Isa::store(tile.largest + column, top);
  Isa::store(tile.decay + column, decay);
  Isa::store(tile.total + column, Isa::fma(Isa::load(tile.total + column), decay, sum));
}

// The columns of a tile from rows of q, times `scale`.
template <class Isa>
inline void gather_queries(const float* const* q, int H, float scale, float* queries) {
  constexpr int W = Isa::kWidth;
  for (int m = 0; m < kTile; m += W) {
    int h = 0;
    for (; h + W <= H; h += W) {
      typename Isa::V part[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) part[i] = Isa::load(q[m + i] + h) * scale;
      Isa::transpose(part);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) Isa::store(queries + (h + i) * kTile + m, part[i]);
    }
    for (; h < H; h++)
      for (int i = 0; i < W; i++) queries[h * kTile + m + i] = q[m + i][h] * scale;
  }
}

// The first `used` columns of `sums`, each by its divisor, to rows of the output.
template <class Isa>
inline void scatter_results(const float* sums, const float* divisors, int H, int used, float* const* out) {
  constexpr int W = Isa::kWidth;
  for (int m = 0; m < used; m += W) {
    const typename Isa::V divisor = Isa::load(divisors + m);
    const int columns = used - m < W ? used - m : W;
    int h = 0;
    for (; h + W <= H; h += W) {
      typename Isa::V part[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) part[i] = Isa::load(sums + (h + i) * kTile + m) / divisor;
      Isa::transpose(part);
      for (int i = 0; i < columns; i++) Isa::store(out[m + i] + h, part[i]);
    }
    for (; h < H; h++)
      for (int i = 0; i < columns; i++) out[m + i][h] = sums[h * kTile + m + i] / divisors[m + i];
  }
}

// Where each token's row of floats is: in the cache itself, or a copy in `copies` with its scale multiplied in.
template <class Isa, class Stored>
inline void find_rows(const Stored* pages, const float* scales, int64_t index, int count, int H, float* copies,
                      const float** rows) {
  for (int i = 0; i < count; i++) {
    const Stored* from = pages + (index + i) * H;
    if constexpr (__is_same(Stored, float)) {
      rows[i] = from;
    } else {
      const auto scale = Isa::set1(scales ? scales[index + i] : 1.0f);
      float* to = copies + static_cast<int64_t>(i) * H;
      int h = 0;
      for (; h + Isa::kWidth <= H; h += Isa::kWidth) Isa::store(to + h, Isa::load(from + h) * scale);
      if (h < H) {
        float last[Isa::kWidth];
        Isa::store(last, load_part<Isa>(from + h, H - h) * scale);
        std::memcpy(to + h, last, (H - h) * sizeof(float));
      }
      rows[i] = to;
    }
  }
}

// One chunk of context for all columns of a tile.
template <class Isa>
inline void attend_chunk(
    const Tile& tile, const float* const* k, const float* const* v, int at, int count, bool masked, int H, float softcap) {
  constexpr int W = Isa::kWidth, R = kRows<Isa>;
  for (int column = 0; column < tile.used; column += 3 * W) {
    for (int i = 0; i < count; i += R)  // past the count, rows are repeated and their logits not used
      tile_logits<Isa, R>(tile.queries + column, k + i, H, tile.weights + i * kTile + column);
    for (int j = 0; j < 3; j++) tile_weights<Isa>(tile, column + j * W, at, count, masked, softcap);
    int h = 0;
    for (; h + R <= H; h += R)
      tile_sums<Isa, R>(
          tile.weights + column, v, count, h, tile.decay + column, tile.sums + static_cast<int64_t>(h) * kTile + column);
    for (; h < H; h++)
      tile_sums<Isa, 1>(
          tile.weights + column, v, count, h, tile.decay + column, tile.sums + static_cast<int64_t>(h) * kTile + column);
  }
}

template <class Isa, class Stored>
void prefill(const AttentionProblem& p, const PrefillPiece& piece, float* scratch) {
  static_assert(kTile % (3 * Isa::kWidth) == 0 && kChunk % kRows<Isa> == 0);
  const int G = p.N / p.K, H = p.H, used = piece.end - piece.first;
  const int token = p.block_token[piece.block], position = p.block_position[piece.block];
  const Tile tile(p, used, scratch);
  auto place = [&](int column) {  // of a query, and of its result
    const int at = piece.first + column;
    return (static_cast<int64_t>(token + at / G) * p.N + piece.kv_head * G + at % G) * H;
  };
  const float* q[kTile];
  for (int m = 0; m < kTile; m++) {
    const int column = m < used ? m : used - 1;  // columns past the end repeat the last one
    q[m] = p.q + place(column);
    const int sees = position + (piece.first + column) / G;
    tile.newest[m] = static_cast<float>(sees);
    tile.oldest[m] = static_cast<float>(sees - p.window + 1);
    tile.largest[m] = kNever;
    tile.total[m] = 0.0f;
  }
  gather_queries<Isa>(q, H, p.scale, tile.queries);
  std::memset(tile.sums, 0, sizeof(float) * H * kTile);

  const int first_seen = position + piece.first / G - p.window + 1, stop = position + (piece.end - 1) / G + 1;
  const int start = first_seen > 0 ? first_seen : 0;
  const int all_see = position + piece.first / G, none_before = position + (piece.end - 1) / G - p.window + 1;
  const auto* k_pages = static_cast<const Stored*>(p.k_pages);
  const auto* v_pages = static_cast<const Stored*>(p.v_pages);
  for (int at = start; at < stop;) {
    const int boundary = (at / kChunk + 1) * kChunk, end = boundary < stop ? boundary : stop;
    const float *k_rows[kChunk], *v_rows[kChunk];
    const int row = p.block_row[piece.block];
    for_each_page(p, row, piece.kv_head, at, end, [&](int from, int count, int64_t index, int64_t) {
      const int i = from - at;
      find_rows<Isa>(k_pages, p.k_scale, index, count, H, tile.k_rows + static_cast<int64_t>(i) * H, k_rows + i);
      find_rows<Isa>(v_pages, p.v_scale, index, count, H, tile.v_rows + static_cast<int64_t>(i) * H, v_rows + i);
    });
    for (int i = end - at; i % kRows<Isa>; i++) k_rows[i] = k_rows[0];
    const bool masked = end - 1 > all_see || at < none_before;
    attend_chunk<Isa>(tile, k_rows, v_rows, at, end - at, masked, H, p.softcap);
    at = end;
  }

  float* out[kTile];
  for (int m = 0; m < kTile; m++) {
    if (m < used) out[m] = p.out + place(m);
    tile.total[m] = tile.total[m] > 0 ? tile.total[m] : 1.0f;  // a NaN is in the sums as well
  }
  scatter_results<Isa>(tile.sums, tile.total, H, used, out);
}

}  // namespace
}  // namespace atoma
