// The functions of dense.h for one variant, whose vectors `Isa` are. Included by dense_*.cc alone.
#pragma once

#include "dense.h"
#include "dots.h"

namespace atoma {
namespace {

// Rows of x by columns that are multiplied at once: as many as leave room for operands in 16 registers.
constexpr int kRowsAtOnce = 3;
constexpr int kColumnsAtOnce = 4;

constexpr int64_t kLine = 64;     // bytes
constexpr int64_t kAhead = 8192;  // bytes

// Asks for the columns behind those that are multiplied, step by step: a processor by itself keeps too few lines on
// their way. Short columns are asked for in the order in which they lie, long ones in that in which they are read. What
// lies behind the weight may be asked for, too: that reads nothing.
template <class Isa, class Stored>
class Ask {
 public:
  Ask(const Stored* columns, int64_t K) {
    const bool is_short = kColumnsAtOnce * K * kSize <= kAhead;
    from_ = columns + (is_short ? kAhead / kSize : kColumnsAtOnce * K);
    to_next_ = is_short ? kLine / kSize : K;
    to_fourth_ = is_short ? kColumnsAtOnce * kLine / kSize : kLine / kSize;
  }

  // GCC takes a function that does nothing but ask for one without effect, and drops its calls: it must be inlined
  // before that.
  __attribute__((always_inline)) void operator()(int64_t h) const {
    const int64_t step = h / Isa::kStep;
    if (step % kSteps != 0) return;
    const int64_t first = step / kSteps * kLines;
#pragma GCC unroll 8
    for (int i = 0; i < kLines; i++) {
      const int64_t line = first + i;
      __builtin_prefetch(from_ + line % kColumnsAtOnce * to_next_ + line / kColumnsAtOnce * to_fourth_);
    }
  }

 private:
  static constexpr int64_t kSize = sizeof(Stored);
  static constexpr int64_t kStepBytes = kColumnsAtOnce * Isa::kStep * kSize;
  static constexpr int kLines = kStepBytes < kLine ? 1 : kStepBytes / kLine;  // asked for at once
  static constexpr int kSteps = kStepBytes < kLine ? kLine / kStepBytes : 1;  // that a line is for
  const Stored* from_;
  int64_t to_next_, to_fourth_;  // numbers from one line to the next, and to the fourth behind it
};

template <class Isa, int Columns, int Rows, class X, class Stored>
void product(const Stored* w, int64_t K, const X* x, bool asks, float* y, int64_t ld) {
  typename Isa::V sums[Rows][Columns];
  clear<Isa>(sums);
  if (Columns == kColumnsAtOnce && asks) {
    add_dots<Isa, Columns, Rows>(x, K, w, K, sums, Ask<Isa, Stored>(w, K));
  } else {
    add_dots<Isa, Columns, Rows>(x, K, w, K, sums, [](int64_t) {});
  }
  store_sums<Isa>(sums, y, ld);
}

template <class Isa, int Columns, class X, class Stored>
void columns_product(const Stored* w, int64_t K, const X* x, int64_t rows, bool asks, float* y, int64_t ld) {
  for (; rows >= kRowsAtOnce; rows -= kRowsAtOnce, x += kRowsAtOnce * K, y += kRowsAtOnce * ld) {
    product<Isa, Columns, kRowsAtOnce>(w, K, x, asks, y, ld);
    asks = false;
  }
  if (rows == 2) product<Isa, Columns, 2>(w, K, x, asks, y, ld);
  if (rows == 1) product<Isa, Columns, 1>(w, K, x, asks, y, ld);
}

template <class Isa, class Stored, class X>
void stored_product(const DenseWeight& weight, int64_t first, int64_t columns, const X* x, int64_t rows, float* y) {
  const int64_t N = weight.N, K = weight.K, end = first + columns;
  const Stored* w = static_cast<const Stored*>(weight.values);
  // Some rows of x after another: they and the columns stay in a core's first cache.
  constexpr int64_t kRows = 2 * kRowsAtOnce;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = rows - row < kRows ? rows - row : kRows;
    const bool asks = row == 0;
    int64_t column = first;
    for (; column + kColumnsAtOnce <= end; column += kColumnsAtOnce) {
      columns_product<Isa, kColumnsAtOnce>(w + column * K, K, x + row * K, count, asks, y + row * N + column, N);
    }
    for (; column < end; column++) {
      columns_product<Isa, 1>(w + column * K, K, x + row * K, count, asks, y + row * N + column, N);
    }
  }
}

template <class Isa>
void dense_product(const DenseWeight& weight, int64_t first, int64_t columns, const float* x, int64_t rows, float* y) {
  switch (weight.type) {
    case DenseType::kFloat32:
      return stored_product<Isa, float>(weight, first, columns, x, rows, y);
    case DenseType::kBfloat16:
      return stored_product<Isa, BFloat16>(weight, first, columns, x, rows, y);
    case DenseType::kFloat16:
      return stored_product<Isa, Half>(weight, first, columns, x, rows, y);
  }
}

}  // namespace
}  // namespace atoma
