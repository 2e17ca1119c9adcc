// Decode: one query of each head of a row against one span of its context. The query heads that share a kv head share
// each read of K and V. For one instruction set, see `float_vectors.h`.
//
// Logits of the whole span first, then their softmax, then the weighted sum of V. Spans are joined by the largest of
// their logits (flash decoding; the arithmetic is that of arXiv:2205.14135).
#pragma once

#include "dots.h"
#include "float_vectors.h"
#include "kv_rows.h"
#include "paged_attention.h"

namespace atoma {
namespace {

constexpr float kNever = -1e30f;  // below any logit, and finite: the difference of two is no NaN

// Query heads that are handled together: as many as leave room in 16 registers for four keys or four vectors of V.
inline int heads_at_once(int left) { return left == 4 ? 2 : (left < 3 ? left : 3); }

// Calls use.template operator()<Heads>(first head) until G heads are done.
template <class Use>
inline void for_each_heads(int G, Use&& use) {
  for (int g = 0; g < G;) {
    const int heads = heads_at_once(G - g);
    if (heads == 3)
      use.template operator()<3>(g);
    else if (heads == 2)
      use.template operator()<2>(g);
    else
      use.template operator()<1>(g);
    g += heads;
  }
}

// Adds weights · rows of V to Vecs vectors of the sums of Heads heads.
template <class Isa, int Heads, int Vecs, class Load>
inline void add_rows(const float* weights, int64_t stride, int count, float* sums, int64_t sums_stride, Load&& load_v) {
  using V = typename Isa::V;
  constexpr int W = Isa::kWidth;
  V acc[Heads][Vecs];
#pragma GCC unroll 16
  for (int g = 0; g < Heads; g++)
#pragma GCC unroll 16
    for (int j = 0; j < Vecs; j++) acc[g][j] = Isa::load(sums + g * sums_stride + j * W);
  for (int i = 0; i < count; i++) {
    V weight[Heads];
#pragma GCC unroll 16
    for (int g = 0; g < Heads; g++) weight[g] = Isa::set1(weights[g * stride + i]);
#pragma GCC unroll 16
    for (int j = 0; j < Vecs; j++) {
      const V value = load_v(i, j);
#pragma GCC unroll 16
      for (int g = 0; g < Heads; g++) acc[g][j] = Isa::fma(weight[g], value, acc[g][j]);
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < Heads; g++)
#pragma GCC unroll 16
    for (int j = 0; j < Vecs; j++) Isa::store(sums + g * sums_stride + j * W, acc[g][j]);
}

// The same over all of a head's dimensions.
template <class Isa, int Heads, class Stored>
inline void add_values(
    const float* weights, int64_t stride, const Stored* v, int count, int H, float* sums, int64_t sums_stride) {
  constexpr int W = Isa::kWidth;
  constexpr int kMost = Heads == 1 ? 8 : 4;
  int h = 0;
  auto block = [&]<int Vecs>() {
    for (; h + Vecs * W <= H; h += Vecs * W) {
      auto load = [&](int i, int j) { return Isa::load(v + static_cast<int64_t>(i) * H + h + j * W); };
      add_rows<Isa, Heads, Vecs>(weights, stride, count, sums + h, sums_stride, load);
    }
  };
  block.template operator()<kMost>();
  block.template operator()<2>();
  block.template operator()<1>();
  if (h < H) {
    auto load = [&](int i, int) { return load_part<Isa>(v + static_cast<int64_t>(i) * H + h, H - h); };
    add_rows<Isa, Heads, 1>(weights, stride, count, sums + h, sums_stride, load);
  }
}

// Logits become weights, exp(logit - largest), with zeros up to a whole vector. Returns the largest and writes the sum.
template <class Isa>
inline float weigh(float* logits, int count, float softcap, float* total) {
  using V = typename Isa::V;
  constexpr int W = Isa::kWidth;
  for (int i = count; i % W; i++) logits[i] = 0.0f;
  if (softcap != 0)
    for (int i = 0; i < count; i += W) Isa::store(logits + i, softcap * tanh<Isa>(Isa::load(logits + i) / softcap));
  for (int i = count; i % W; i++) logits[i] = -INFINITY;
  V top = Isa::set1(kNever);
  for (int i = 0; i < count; i += W) top = Isa::max(Isa::load(logits + i), top);  // NaN then shows in the sum
  const float largest = Isa::largest(top);
  V sum = Isa::zero();
  for (int i = 0; i < count; i += W) {
    const V x = exp<Isa>(Isa::load(logits + i) - largest);
    sum += x;
    Isa::store(logits + i, x);
  }
  *total = Isa::sum(sum);
  return largest;
}

template <class Isa, class Stored>
void decode(const AttentionProblem& p, const DecodePiece& piece, float* scratch) {
  const int G = p.N / p.K, H = p.H;
  const int64_t padded = (H + Isa::kWidth - 1) / Isa::kWidth * Isa::kWidth, stride = kSpan + 16;
  float* queries = scratch;              // [G, padded]
  float* logits = queries + G * padded;  // [G, stride]
  const float* q = p.q + (static_cast<int64_t>(piece.row) * p.N + piece.kv_head * G) * H;
  for (int g = 0; g < G; g++)
    for (int h = 0; h < padded; h++) queries[g * padded + h] = h < H ? q[g * H + h] * p.scale : 0.0f;

  const auto* k = static_cast<const Stored*>(p.k_pages);
  const auto* v = static_cast<const Stored*>(p.v_pages);
  auto for_pages = [&](auto&& use) { for_each_page(p, piece.row, piece.kv_head, piece.first, piece.end, use); };
  const Stored* first_values = v + token_index(p, piece.row, piece.kv_head, piece.first) * H;
  for_pages([&](int at, int count, int64_t index, int64_t next) {
    float* here = logits + at - piece.first;
    const Stored* ahead = next < 0 ? first_values : k + next * H;
    for_each_heads(G, [&]<int Heads>(int g) {
      int i = 0;
      for (; i + 4 <= count; i += 4) {
        if (g == 0) fetch_rows(ahead + static_cast<int64_t>(i) * H, 4, H);
        dots<Isa, 4, Heads>(queries + g * padded, padded, k + (index + i) * H, H, here + g * stride + i, stride);
      }
      for (; i < count; i++)
        dots<Isa, 1, Heads>(queries + g * padded, padded, k + (index + i) * H, H, here + g * stride + i, stride);
    });
    if (p.k_scale)
      for (int g = 0; g < G; g++)
        for (int i = 0; i < count; i++) here[g * stride + i] *= p.k_scale[index + i];
  });

  // The queries are done with: their place takes the sums.
  float* sums = queries;
  float largest[1], total[1];
  for (int g = 0; g < G; g++) {
    *largest = weigh<Isa>(logits + g * stride, piece.end - piece.first, p.softcap, total);
    piece.partial[g * (H + 2) + H] = *largest;
    piece.partial[g * (H + 2) + H + 1] = *total;
    for (int h = 0; h < padded; h++) sums[g * padded + h] = 0.0f;
  }
  for_pages([&](int at, int count, int64_t index, int64_t next) {
    float* here = logits + at - piece.first;
    if (next >= 0) fetch_rows(v + next * H, count, H);
    if (p.v_scale)
      for (int g = 0; g < G; g++)
        for (int i = 0; i < count; i++) here[g * stride + i] *= p.v_scale[index + i];
    for_each_heads(G, [&]<int Heads>(int g) {
      add_values<Isa, Heads>(here + g * stride, stride, v + index * H, count, H, sums + g * padded, padded);
    });
  });
  for (int g = 0; g < G; g++)
    for (int h = 0; h < H; h++) piece.partial[g * (H + 2) + h] = sums[g * padded + h];
}

inline void join(const AttentionProblem& p, int row, int kv_head, int spans, const float* partials) {
  const int G = p.N / p.K, H = p.H;
  const int64_t of_head = H + 2, of_span = G * of_head;
  for (int g = 0; g < G; g++) {
    const float* partial = partials + g * of_head;
    float* out = p.out + (static_cast<int64_t>(row) * p.N + kv_head * G + g) * H;
    float largest = kNever;
    for (int i = 0; i < spans; i++) {
      const float top = partial[i * of_span + H];
      largest = top > largest ? top : largest;
    }
    float total = 0.0f;
    for (int h = 0; h < H; h++) out[h] = 0.0f;
    for (int i = 0; i < spans; i++) {
      const float* part = partial + i * of_span;
      const float decay = std::exp(part[H] - largest);
      total += part[H + 1] * decay;
      for (int h = 0; h < H; h++) out[h] += part[h] * decay;
    }
    const float divisor = total > 0 ? total : 1.0f;  // a NaN is in the sums as well
    for (int h = 0; h < H; h++) out[h] /= divisor;
  }
}

}  // namespace
}  // namespace atoma
