// The packing of pack.h. Rows that lie in one tile are handled together, so that each of its lines is written at once.
#include "pack.h"

#include <algorithm>
#include <cstring>

#include "codes.h"

namespace atoma {

namespace {

// Rows first … end - 1 that go to one tile.
int64_t end_of_tile(const int64_t* to, int64_t first, int64_t n) {
  int64_t end = first + 1;
  while (end < n && end - first < kTile && to[end] / kTile == to[first] / kTile) end++;
  return end;
}

// The lowest bits of each of four bytes.
constexpr uint32_t mask_of(int bits) { return 0x01010101u * ((1u << bits) - 1); }

// One block of a row: `bits` words, 32 columns apart.
template <int bits>
void pack_block(const uint8_t* codes, uint8_t* out) {
  constexpr auto fields = fields_of<bits>();
  uint32_t inputs[kBlock / 4], words[bits] = {};
  std::memcpy(inputs, codes, sizeof inputs);
#pragma GCC unroll 12
  for (const Field& field : fields) {
    words[field.word] |= (inputs[field.step] >> field.shift & mask_of(field.width)) << field.bit;
  }
  for (int word = 0; word < bits; word++) std::memcpy(out + word * kTile * 4, words + word, 4);
}

template <int bits>
void pack_codes_of(const uint8_t* codes, int64_t n, int64_t K, const int64_t* to, int64_t blocks, uint8_t* out) {
  constexpr int64_t kBlockBytes = kTile * kBlock * bits / 8;
  for (int64_t first = 0; first < n;) {
    const int64_t end = end_of_tile(to, first, n);
    uint8_t* tile = out + to[first] / kTile * blocks * kBlockBytes;
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t inputs = std::min<int64_t>(kBlock, K - block * kBlock);
      for (int64_t row = first; row < end; row++) {
        const uint8_t* from = codes + row * K + block * kBlock;
        uint8_t filled[kBlock] = {};
        if (inputs < kBlock) from = static_cast<uint8_t*>(std::memcpy(filled, from, inputs));
        pack_block<bits>(from, tile + block * kBlockBytes + to[row] % kTile * 4);
      }
    }
    first = end;
  }
}

template <class Factor>
void pack_factors_of(const void* factors, int64_t n, int64_t groups, const int64_t* to, int64_t filled, void* out) {
  const auto* from = static_cast<const Factor*>(factors);
  for (int64_t first = 0; first < n;) {
    const int64_t end = end_of_tile(to, first, n);
    Factor* tile = static_cast<Factor*>(out) + to[first] / kTile * filled * kTile;
    for (int64_t group = 0; group < groups; group++) {
      for (int64_t row = first; row < end; row++) tile[group * kTile + to[row] % kTile] = from[row * groups + group];
    }
    first = end;
  }
}

}  // namespace

void pack_codes(const uint8_t* codes, int64_t n, int64_t K, int bits, const int64_t* to, int64_t blocks, uint8_t* out) {
  for_bits(bits, [&]<int own>() { pack_codes_of<own>(codes, n, K, to, blocks, out); });
}

void pack_factors(const void* factors, int64_t n, int64_t groups, int64_t bytes, const int64_t* to, int64_t filled,
                  void* out) {
  if (bytes == 4) return pack_factors_of<uint32_t>(factors, n, groups, to, filled, out);
  if (bytes == 2) return pack_factors_of<uint16_t>(factors, n, groups, to, filled, out);
  pack_factors_of<uint8_t>(factors, n, groups, to, filled, out);
}

}  // namespace atoma
