// Packing of rows into the tiles of matmul.h, for loading: what `native/tiles.py` says, done here when it can be.
//
// Rows come in any order; a row's bytes go where it belongs in its tile. Callers bring their own threads, and never two
// rows of one place.
#pragma once

#include <cstdint>

namespace atoma {

// Codes [n][K] of `bits` bits, one a byte, into those of a weight: row i becomes row `to[i]`. Inputs that fill up the
// last block of a row become zeros.
void pack_codes(const uint8_t* codes, int64_t n, int64_t K, int bits, const int64_t* to, int64_t blocks, uint8_t* out);

// Scales, mins or supers [n][groups] of `bytes` bytes each into [tiles][filled][32]: row i becomes row `to[i]`.
void pack_factors(const void* factors, int64_t n, int64_t groups, int64_t bytes, const int64_t* to, int64_t filled,
                  void* out);

}  // namespace atoma
