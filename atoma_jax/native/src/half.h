// Floats of 16 bits as float32, in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace atoma {

static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float float_of_bfloat(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

static inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | rest << 13);  // infinity and NaN
  // The smaller exponent's bias is 112 less; a denormal number has no hidden bit.
  const float size = rest < 0x0400 ? static_cast<float>(rest) * 0x1p-24f : float_of_bits(rest << 13) * 0x1p112f;
  return sign ? -size : size;
}

}  // namespace atoma
