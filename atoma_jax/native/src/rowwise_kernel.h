// The functions of rowwise.h for one instruction set, see float_vectors.h. Included by rowwise_*.cc alone.
#pragma once

#include <cstring>

#include "float_vectors.h"
#include "rowwise.h"

namespace atoma {
namespace {

// Stores the first n ≤ kWidth numbers.
template <class Isa>
inline void store_part(float* to, int64_t n, typename Isa::V v) {
  if (n == Isa::kWidth) return Isa::store(to, v);
  float values[Isa::kWidth];
  Isa::store(values, v);
  std::memcpy(to, values, n * sizeof(float));
}

template <class Isa>
void rms_norm_row(const float* x, const float* scale, int64_t D, float eps, float* out) {
  constexpr int W = Isa::kWidth;
  typename Isa::V sums[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
  int64_t at = 0;
  for (; at + 4 * W <= D; at += 4 * W) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const auto part = Isa::load(x + at + i * W);
      sums[i] = Isa::fma(part, part, sums[i]);
    }
  }
  for (; at < D; at += W) {
    const auto part = D - at < W ? load_part<Isa>(x + at, static_cast<int>(D - at)) : Isa::load(x + at);
    sums[0] = Isa::fma(part, part, sums[0]);
  }
  const float mean = Isa::sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(D);
  const auto factor = Isa::set1(1.0f / __builtin_sqrtf(mean + eps));
  for (at = 0; at + W <= D; at += W) Isa::store(out + at, Isa::load(x + at) * factor * Isa::load(scale + at));
  if (at == D) return;
  const int left = static_cast<int>(D - at);
  store_part<Isa>(out + at, left, load_part<Isa>(x + at, left) * factor * load_part<Isa>(scale + at, left));
}

// Rotary embedding (arXiv:2104.09864): pairs of the first and the second half turn.
template <class Isa>
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  constexpr int W = Isa::kWidth;
  for (int64_t at = 0; at < half; at += W) {
    const int count = half - at < W ? static_cast<int>(half - at) : W;
    const auto load = [&](const float* from) { return count == W ? Isa::load(from) : load_part<Isa>(from, count); };
    const auto first = load(x + at), second = load(x + half + at), c = load(cos + at), s = load(sin + at);
    store_part<Isa>(x + at, count, first * c - second * s);
    store_part<Isa>(x + half + at, count, second * c + first * s);
  }
}

template <class Isa>
void rotate_heads_row(const Heads& heads, const float* qkv, const float* cos, const float* sin, float* q, float* k,
                      float* v) {
  const int64_t H = heads.H;
  const auto turn = [&](const float* scale, float* to) {
    if (scale != nullptr) {
      rms_norm_row<Isa>(qkv, scale, H, heads.eps, to);
    } else {
      std::memcpy(to, qkv, H * sizeof(float));
    }
    rotate<Isa>(to, cos, sin, heads.half);
    qkv += H;
  };
  for (int64_t head = 0; head < heads.K; head++) {
    for (int64_t g = 0; g < heads.G; g++) turn(heads.q_scale, q + (head * heads.G + g) * H);
    turn(heads.k_scale, k + head * H);
    std::memcpy(v + head * H, qkv, H * sizeof(float));
    qkv += H;
  }
}

template <class Isa, Gate kind>
inline typename Isa::V activated(typename Isa::V x) {
  if constexpr (kind == Gate::kSilu) return x / (1.0f + exp<Isa>(-x));
  if constexpr (kind == Gate::kGeluTanh) {
    // As `jax.nn.gelu(approximate=True)`: √(2/π) in front of the cubic.
    return x * (0.5f + 0.5f * tanh<Isa>(0.7978845608f * (x + 0.044715f * (x * x * x))));
  }
  const auto positive = x < 0.0f ? Isa::zero() : x;  // a NaN stays one
  return positive * positive;
}

template <class Isa, Gate kind>
void gated_row_of(const float* gate, const float* up, int64_t F, float* out) {
  constexpr int W = Isa::kWidth;
  int64_t at = 0;
  for (; at + W <= F; at += W) Isa::store(out + at, activated<Isa, kind>(Isa::load(gate + at)) * Isa::load(up + at));
  if (at == F) return;
  const int left = static_cast<int>(F - at);
  const auto last = activated<Isa, kind>(load_part<Isa>(gate + at, left));
  store_part<Isa>(out + at, left, last * load_part<Isa>(up + at, left));
}

template <class Isa>
void gated_row(const float* gate, const float* up, int64_t F, Gate kind, float* out) {
  switch (kind) {
    case Gate::kSilu:
      return gated_row_of<Isa, Gate::kSilu>(gate, up, F, out);
    case Gate::kGeluTanh:
      return gated_row_of<Isa, Gate::kGeluTanh>(gate, up, F, out);
    case Gate::kReluSquared:
      return gated_row_of<Isa, Gate::kReluSquared>(gate, up, F, out);
  }
}

template <class Isa>
constexpr RowwiseKernels rowwise_kernels_of() {
  return {rms_norm_row<Isa>, rotate_heads_row<Isa>, gated_row<Isa>};
}

}  // namespace
}  // namespace atoma
