// Scales and mins of a tile, for one variant, `Isa`: decoded aside, once for many rows, or read by a product as they are
// stored. Both give the same bits. Included by matmul_kernel.h alone.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace atoma {
namespace {

template <class Isa, FactorType type>
typename Isa::Floats load_factors(const void* values, int64_t at) {
  if constexpr (type == FactorType::kFloat32) return Isa::load(static_cast<const float*>(values) + at);
  if constexpr (type == FactorType::kFloat16) return Isa::load_f16(static_cast<const uint16_t*>(values) + at);
  if constexpr (type == FactorType::kBfloat16) return Isa::load_bf16(static_cast<const uint16_t*>(values) + at);
  if constexpr (type == FactorType::kInt8) return Isa::load_int8(static_cast<const int8_t*>(values) + at);
}

template <class Isa, FactorType type>
void decode_factors_of(const Factors& factors, int64_t tile, int64_t spread, float* out) {
  const int64_t start = tile * factors.groups * kTile;
  const float* supers = factors.supers == nullptr ? nullptr : factors.supers + tile * factors.supergroups * kTile;
  const int64_t per_super = factors.supergroups == 0 ? 1 : factors.groups / factors.supergroups;
  int64_t left = per_super;
  for (int64_t group = 0; group < factors.groups; group++) {
    for (int column = 0; column < kTile; column += Isa::kLanes) {
      auto value = load_factors<Isa, type>(factors.values, start + group * kTile + column);
      if (supers != nullptr) value = Isa::mul(value, Isa::load(supers + column));
      for (int64_t i = 0; i < spread; i++) Isa::store(out + i * kTile + column, value);
    }
    out += spread * kTile;
    if (supers != nullptr && --left == 0) {
      supers += kTile;
      left = per_super;
    }
  }
}

template <class Isa>
void decode_factors(const Factors& factors, int64_t tile, int64_t spread, float* out) {
  switch (factors.type) {
    case FactorType::kFloat32:
      return decode_factors_of<Isa, FactorType::kFloat32>(factors, tile, spread, out);
    case FactorType::kFloat16:
      return decode_factors_of<Isa, FactorType::kFloat16>(factors, tile, spread, out);
    case FactorType::kBfloat16:
      return decode_factors_of<Isa, FactorType::kBfloat16>(factors, tile, spread, out);
    case FactorType::kInt8:
      return decode_factors_of<Isa, FactorType::kInt8>(factors, tile, spread, out);
  }
}

// Floats that `decode_factors` has made, [parts][32].
template <class Isa, int subs>
class DecodedFactors {
 public:
  DecodedFactors(const float* values, int column) : at_(values == nullptr ? nullptr : values + column) {}

  bool is_there() const { return at_ != nullptr; }
  // Vector v of part `sub` of the block.
  template <int sub>
  typename Isa::Floats load(int v) const {
    return Isa::load(at_ + sub * kTile + v * Isa::kLanes);
  }
  // Goes to the next block.
  void next() { at_ += subs * kTile; }

 private:
  const float* at_;
};

// Of blocks, or of 0 where there are no groups. Most formats have a group for each block: a tile of one row is over too
// soon for a division.
inline int64_t blocks_of(int64_t blocks, int64_t groups) {
  return groups == blocks ? 1 : groups == 0 ? 0 : blocks / groups;
}

// Where the factors of a tile begin.
struct StoredTile {
  StoredTile(const Factors& factors, const TiledWeight& weight, int64_t tile)
      : values(factors.values),
        first(tile * factors.groups * kTile),
        supers(factors.supers == nullptr ? nullptr : factors.supers + tile * factors.supergroups * kTile),
        blocks_of_group(blocks_of(weight.blocks, factors.groups)),
        blocks_of_super(blocks_of(weight.blocks, factors.supergroups)) {}

  const void* values;
  int64_t first;
  const float* supers;
  int64_t blocks_of_group, blocks_of_super;  // 0: a block has two groups; there are none
};

// How far ahead of a product factors are asked for.
constexpr int64_t kFactorsAhead = 1024;  // bytes

// Factors as they are stored.
template <class Isa, FactorType type, bool with_supers, int subs>
class StoredFactors {
 public:
  StoredFactors(const StoredTile& tile, int column)
      : values_(tile.values),
        at_(tile.first + column),
        supers_(with_supers && tile.values != nullptr ? tile.supers + column : nullptr),
        of_group_(tile.blocks_of_group),
        left_of_group_(tile.blocks_of_group),
        of_super_(tile.blocks_of_super),
        left_of_super_(tile.blocks_of_super) {}

  bool is_there() const { return values_ != nullptr; }
  template <int sub>
  typename Isa::Floats load(int v) const {
    const auto value = load_factors<Isa, type>(values_, at_ + sub * kTile + v * Isa::kLanes);
    if constexpr (with_supers) return Isa::mul(value, Isa::load(supers_ + v * Isa::kLanes));
    return value;
  }
  void next() {
    if (subs == 2 || --left_of_group_ == 0) {
      __builtin_prefetch(static_cast<const char*>(values_) + at_ * size_of(type) + kFactorsAhead);
      at_ += subs * kTile;
      left_of_group_ = of_group_;
    }
    if (with_supers && --left_of_super_ == 0) {
      supers_ += kTile;
      left_of_super_ = of_super_;
    }
  }

 private:
  const void* values_;
  int64_t at_;
  const float* supers_;
  int64_t of_group_, left_of_group_, of_super_, left_of_super_;  // blocks
};

// Whether scales, and mins where there are some, lie as StoredFactors reads them: alike, and in whole blocks but for
// groups of half a block.
inline bool lie_as_read(const TiledWeight& weight) {
  const auto fit = [&](const Factors& factors) {
    const auto are_whole = [&](int64_t groups) { return groups * blocks_of(weight.blocks, groups) == weight.blocks; };
    const bool groups_fit = weight.subs == 2 ? factors.groups == 2 * weight.blocks : are_whole(factors.groups);
    return groups_fit && (factors.supers == nullptr || are_whole(factors.supergroups));
  };
  if (!fit(weight.scales)) return false;
  if (weight.mins.values == nullptr) return true;
  return fit(weight.mins) && weight.mins.type == weight.scales.type &&
         (weight.mins.supers == nullptr) == (weight.scales.supers == nullptr);
}

}  // namespace
}  // namespace atoma
