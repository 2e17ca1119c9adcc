// The function of dense.h for one variant, whose vectors `Isa` are. Included by dense_*.cc alone.
#pragma once

#include "dense.h"
#include "dots.h"

namespace atoma {
namespace {

// Rows of x that are multiplied at once, by four rows of W: as many as leave room for these in 16 registers.
constexpr int kDenseRows = 3;

template <class Isa, class Stored, int Columns>
void dense_columns(const Stored* w, int64_t K, const float* x, int64_t rows, float* y, int64_t N) {
  const int H = static_cast<int>(K);
  for (; rows >= kDenseRows; rows -= kDenseRows, x += kDenseRows * K, y += kDenseRows * N) {
    dots<Isa, Columns, kDenseRows>(x, K, w, H, y, N);
  }
  if (rows == 2) dots<Isa, Columns, 2>(x, K, w, H, y, N);
  if (rows == 1) dots<Isa, Columns, 1>(x, K, w, H, y, N);
}

// Asks for what few rows of x will read next: the processor by itself keeps too few lines on their way. What lies behind
// the weight may be asked for, too: that reads nothing.
template <class Stored>
void prefetch(const Stored* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Stored);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

template <class Isa, class Stored>
void dense_product_of(const DenseWeight& weight, int64_t first, int64_t columns, const float* x, int64_t rows,
                      float* y) {
  const int64_t N = weight.N, K = weight.K, end = first + columns;
  const Stored* w = static_cast<const Stored*>(weight.values);
  // Some rows of x after another: they and the columns' rows of W stay in a core's first cache.
  constexpr int64_t kRowsAtOnce = 2 * kDenseRows;
  for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
    const int64_t count = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
    int64_t column = first;
    for (; column + 4 <= end; column += 4) {
      if (rows <= kDenseRows) prefetch(w + (column + 4) * K, 4 * K);
      dense_columns<Isa, Stored, 4>(w + column * K, K, x + row * K, count, y + row * N + column, N);
    }
    for (; column < end; column++) {
      dense_columns<Isa, Stored, 1>(w + column * K, K, x + row * K, count, y + row * N + column, N);
    }
  }
}

template <class Isa>
void dense_product(const DenseWeight& weight, int64_t first, int64_t columns, const float* x, int64_t rows, float* y) {
  switch (weight.type) {
    case DenseType::kFloat32:
      return dense_product_of<Isa, float>(weight, first, columns, x, rows, y);
    case DenseType::kBfloat16:
      return dense_product_of<Isa, BFloat16>(weight, first, columns, x, rows, y);
    case DenseType::kFloat16:
      return dense_product_of<Isa, Half>(weight, first, columns, x, rows, y);
  }
}

}  // namespace
}  // namespace atoma
