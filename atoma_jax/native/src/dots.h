// Dot products of some vectors with some rows that lie one behind the other: of queries with keys, of activations with
// rows of a weight. For one instruction set, see `float_vectors.h`.
#pragma once

#include "float_vectors.h"

namespace atoma {
namespace {

// to[q * to_stride + i] = Σ_h x[q * x_stride + h] · rows[i * H + h], for Vectors vectors x and Rows rows. Sums are made
// in the same order whatever Vectors is.
template <class Isa, int Rows, int Vectors, class Stored>
inline void dots(const float* x, int64_t x_stride, const Stored* rows, int H, float* to, int64_t to_stride) {
  using V = typename Isa::V;
  constexpr int W = Isa::kWidth;
  V acc[Vectors][Rows];  // set one by one: compilers clear a whole array in memory
#pragma GCC unroll 16
  for (int q = 0; q < Vectors; q++)
#pragma GCC unroll 16
    for (int i = 0; i < Rows; i++) acc[q][i] = Isa::zero();
  auto add = [&](int h, auto&& load) {
    V values[Vectors];
#pragma GCC unroll 16
    for (int q = 0; q < Vectors; q++) values[q] = load(x + q * x_stride + h);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; i++) {
      const V row = load(rows + static_cast<int64_t>(i) * H + h);
#pragma GCC unroll 16
      for (int q = 0; q < Vectors; q++) acc[q][i] = Isa::fma(values[q], row, acc[q][i]);
    }
  };
  int h = 0;
  for (; h + W <= H; h += W) add(h, [](const auto* from) { return Isa::load(from); });
  if (h < H) add(h, [&](const auto* from) { return load_part<Isa>(from, H - h); });
#pragma GCC unroll 16
  for (int q = 0; q < Vectors; q++) {
    int i = 0;
    for (; i + 4 <= Rows; i += 4) Isa::sums4(acc[q] + i, to + q * to_stride + i);
    for (; i < Rows; i++) to[q * to_stride + i] = Isa::sum(acc[q][i]);
  }
}

}  // namespace
}  // namespace atoma
