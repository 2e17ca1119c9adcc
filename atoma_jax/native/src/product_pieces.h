// How work on many rows, by themselves or times a weight, becomes pieces for the pool.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace atoma {

inline constexpr int64_t kRowsOfAPiece = 128;  // about; their activations stay in a core's second cache while tiles go by
inline constexpr int64_t kRowsAtOnce = 12;     // a multiple of what kernels multiply at once: pieces have whole ones
inline constexpr int64_t kPiecesOfAThread = 4;
inline constexpr int64_t kActivationsAlone = 1 << 14;  // waking a thread costs more than what is done to as many

// Calls use(row) for each row of K activations, on all threads where there are many.
template <class Use>
void for_each_row(Pool& pool, int64_t rows, int64_t K, Use&& use) {
  const int64_t at_once = std::max<int64_t>(1, kActivationsAlone / 4 / K), pieces = (rows + at_once - 1) / at_once;
  const auto piece = [&](int64_t number) {
    const int64_t end = std::min(rows, (number + 1) * at_once);
    for (int64_t row = number * at_once; row < end; row++) use(row);
  };
  if (rows * K > kActivationsAlone) return pool.for_each(pieces, piece);
  for (int64_t number = 0; number < pieces; number++) piece(number);
}

// Calls use(first row, count of rows, tile) for each tile of columns and each run of rows, on all threads.
template <class Use>
void for_each_tile(Pool& pool, int64_t rows, int64_t tiles, Use&& use) {
  const auto parts = [](int64_t all, int64_t part) { return (all + part - 1) / part; };
  const int64_t of_span = parts(parts(rows, parts(rows, kRowsOfAPiece)), kRowsAtOnce) * kRowsAtOnce;
  const int64_t spans = parts(rows, of_span);
  const int64_t wanted = kPiecesOfAThread * pool.threads();  // of a span: its last ones even out what cores differ by
  const int64_t at_once = std::max<int64_t>(1, tiles / wanted);
  const int64_t pieces = parts(tiles, at_once);
  pool.for_each(spans * pieces, [&](int64_t piece) {
    const int64_t first_row = piece / pieces * of_span, first_tile = piece % pieces * at_once;
    const int64_t count = std::min(of_span, rows - first_row);
    for (int64_t tile = first_tile; tile < std::min(tiles, first_tile + at_once); tile++) use(first_row, count, tile);
  });
}

}  // namespace atoma
