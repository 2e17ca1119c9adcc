// Dot products of some vectors with some rows: of queries with keys, of activations with rows of a weight. For one
// instruction set, see `float_vectors.h`.
#pragma once

#include "float_vectors.h"

namespace atoma {
namespace {

// sums[q][i] += x[q * x_stride + h] · rows[i * H + h] over all h, for Vectors vectors x and Rows rows: lane by lane, in
// the same order whatever Vectors and Rows are. Calls `each(h)` at every step.
template <class Isa, int Rows, int Vectors, class X, class Stored, class Each>
inline __attribute__((always_inline)) void add_dots(const X* x, int64_t x_stride, const Stored* rows, int64_t H,
                                                    typename Isa::V (&sums)[Vectors][Rows], const Each& each) {
  auto add = [&](int64_t h, auto&& load) {
    typename Isa::Operand values[Vectors];
#pragma GCC unroll 16
    for (int q = 0; q < Vectors; q++) values[q] = load(x + q * x_stride + h);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; i++) {
      const typename Isa::Operand row = load(rows + i * H + h);
#pragma GCC unroll 16
      for (int q = 0; q < Vectors; q++) sums[q][i] = Isa::fma(values[q], row, sums[q][i]);
    }
  };
  constexpr int step = Isa::kStep;
  int64_t h = 0;
  for (; h + step <= H; h += step) {
    each(h);
    add(h, [](const auto* from) { return Isa::load(from); });
  }
  if (h < H) add(h, [&](const auto* from) { return load_part<Isa>(from, static_cast<int>(H - h)); });
}

// The sums over their lanes, to[q * to_stride + i].
template <class Isa, int Rows, int Vectors>
inline __attribute__((always_inline)) void store_sums(const typename Isa::V (&sums)[Vectors][Rows], float* to,
                                                      int64_t to_stride) {
#pragma GCC unroll 16
  for (int q = 0; q < Vectors; q++) {
    int i = 0;
    for (; i + 4 <= Rows; i += 4) Isa::sums4(sums[q] + i, to + q * to_stride + i);
    for (; i < Rows; i++) to[q * to_stride + i] = Isa::sum(sums[q][i]);
  }
}

// Sets them to zero one by one: compilers clear a whole array in memory.
template <class Isa, int Rows, int Vectors>
inline __attribute__((always_inline)) void clear(typename Isa::V (&sums)[Vectors][Rows]) {
#pragma GCC unroll 16
  for (int q = 0; q < Vectors; q++)
#pragma GCC unroll 16
    for (int i = 0; i < Rows; i++) sums[q][i] = Isa::zero();
}

// to[q * to_stride + i] = Σ_h x[q * x_stride + h] · rows[i * H + h].
template <class Isa, int Rows, int Vectors, class Stored>
inline void dots(const float* x, int64_t x_stride, const Stored* rows, int H, float* to, int64_t to_stride) {
  typename Isa::V sums[Vectors][Rows];
  clear<Isa>(sums);
  add_dots<Isa, Rows, Vectors>(x, x_stride, rows, H, sums, [](int64_t) {});
  store_sums<Isa>(sums, to, to_stride);
}

}  // namespace
}  // namespace atoma
