// The functions of sampling.h for one variant, whose vectors `Isa` are. Included by sampling_*.cc alone.
#pragma once

#include "float_vectors.h"
#include "sampling.h"

namespace atoma {
namespace {

constexpr float kNormUnit = 1 << kNormBits;
constexpr float kWhole = 8388608.0f;  // 2^23, from which on floats are whole numbers

// Calls use(first token, block of logits) for each block of a row; behind V it has `fill`.
template <class Use>
inline void for_each_block(const float* logits, int64_t V, float fill, Use&& use) {
  int64_t at = 0;
  for (; at + kVocabBlock <= V; at += kVocabBlock) use(at, logits + at);
  if (at == V) return;
  float last[kVocabBlock];
  for (int64_t i = 0; i < kVocabBlock; i++) last[i] = at + i < V ? logits[at + i] : fill;
  use(at, last);
}

template <class Isa>
inline typename Isa::I whole_numbers(typename Isa::V x) {
  return __builtin_convertvector(x, typename Isa::I);
}

template <class Isa>
inline int32_t sum_of(typename Isa::I x) {
  int32_t sum = 0;
  for (int i = 0; i < Isa::kWidth; i++) sum += x[i];
  return sum;
}

template <class Isa>
inline typename Isa::I load_whole(const int32_t* from) {
  typename Isa::I x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class Isa>
inline void store_whole(void* to, typename Isa::I x) {
  std::memcpy(to, &x, sizeof x);
}

template <class Isa>
int64_t exponentials(const float* logits, int64_t V, float top, float temperature, float* out) {
  using Floats = typename Isa::V;
  using Whole = typename Isa::I;
  const Floats tops = Isa::set1(top), divisor = Isa::set1(temperature);
  int64_t sum = 0;
  for_each_block(logits, V, -INFINITY, [&](int64_t at, const float* block) {
    Whole sums{};
    for (int64_t i = 0; i < kVocabBlock; i += Isa::kWidth) {
      const Floats e = exp<Isa>((Isa::load(block + i) - tops) / divisor);
      Isa::store(out + at + i, e);
      const Floats units = e * kNormUnit;
      const Whole whole = whole_numbers<Isa>(units);
      sums += whole - (__builtin_convertvector(whole, Floats) < units);  // a comparison that holds is -1
    }
    sum += sum_of<Isa>(sums);
  });
  return sum;
}

template <class Isa>
void weigh(const float* logits, int64_t V, float floor, float scale, float* exponentials, int32_t* sums, float* tops) {
  using Floats = typename Isa::V;
  using Whole = typename Isa::I;
  const Floats lowest = Isa::set1(floor), by = Isa::set1(scale);
  for_each_block(logits, V, -INFINITY, [&](int64_t at, const float* block) {
    Whole own{};
    Floats top = Isa::load(block);
    for (int64_t i = 0; i < kVocabBlock; i += Isa::kWidth) {
      const Floats x = Isa::load(exponentials + at + i) * by, logit = Isa::load(block + i);
      const Floats rounded = x < kWhole ? (x + kWhole) - kWhole : x;
      const Whole weight = whole_numbers<Isa>(rounded) & (logit >= lowest);
      own += weight;
      top = Isa::max(top, logit);
      store_whole<Isa>(exponentials + at + i, weight);
    }
    sums[at / kVocabBlock] = sum_of<Isa>(own);
    tops[at / kVocabBlock] = Isa::largest(top);
  });
}

template <class Isa>
void keep(const float* logits, int64_t V, float cut, int32_t* weights, int32_t* sums) {
  using Whole = typename Isa::I;
  const typename Isa::V lowest = Isa::set1(cut);
  for_each_block(logits, V, -INFINITY, [&](int64_t at, const float* block) {
    Whole own{};
    for (int64_t i = 0; i < kVocabBlock; i += Isa::kWidth) {
      const Whole weight = load_whole<Isa>(weights + at + i) & (Isa::load(block + i) >= lowest);
      own += weight;
      store_whole<Isa>(weights + at + i, weight);
    }
    sums[at / kVocabBlock] = sum_of<Isa>(own);
  });
}

template <class Isa>
int64_t weight_from(const float* logits, int64_t V, const int32_t* weights, const float* tops, float bound) {
  using Whole = typename Isa::I;
  const typename Isa::V lowest = Isa::set1(bound);
  int64_t sum = 0;
  for_each_block(logits, V, -INFINITY, [&](int64_t at, const float* block) {
    if (tops[at / kVocabBlock] < bound) return;
    Whole own{};
    for (int64_t i = 0; i < kVocabBlock; i += Isa::kWidth) {
      own += load_whole<Isa>(weights + at + i) & (Isa::load(block + i) >= lowest);
    }
    sum += sum_of<Isa>(own);
  });
  return sum;
}

template <class Isa>
double survey(const float* logits, int64_t V, float top, float own, int64_t token, int64_t* before) {
  using Floats = typename Isa::V;
  using Whole = typename Isa::I;
  const Floats tops = Isa::set1(top), mine = Isa::set1(own);
  Whole lanes{};
  for (int i = 0; i < Isa::kWidth; i++) lanes[i] = i;
  double sum = 0;
  int64_t count = 0;
  for_each_block(logits, V, -INFINITY, [&](int64_t at, const float* block) {
    Floats sums = Isa::zero();
    Whole found{};
    const int64_t own_place = token - at;  // in this block, or outside of it
    const int32_t place = static_cast<int32_t>(own_place < 0 ? 0 : own_place > kVocabBlock ? kVocabBlock : own_place);
    for (int64_t i = 0; i < kVocabBlock; i += Isa::kWidth) {
      const Floats x = Isa::load(block + i);
      sums += exp<Isa>(x - tops);
      found -= (x > mine) | ((x == mine) & (lanes + static_cast<int32_t>(i) < place));
    }
    sum += static_cast<double>(Isa::sum(sums));
    count += sum_of<Isa>(found);
  });
  *before = count;
  return sum;
}

template <class Isa>
constexpr SamplingKernels sampling_kernels_of() {
  return {exponentials<Isa>, weigh<Isa>, keep<Isa>, weight_from<Isa>, survey<Isa>};
}

}  // namespace
}  // namespace atoma
