// Products and look-ups of matmul.h over all tiles: scratch memory, and pieces for the pool.
#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "half.h"
#include "pool.h"
#include "product_pieces.h"
#include "variant.h"

namespace atoma {

extern const MatmulKernels kMatmulPortable;
#if defined(__x86_64__)
extern const MatmulKernels kMatmulAvx2, kMatmulAvx512;
#endif

const MatmulKernels& matmul_kernels() {
#if defined(__x86_64__)
  if (active_variant() >= Variant::kAvx512Vnni) return kMatmulAvx512;
  if (active_variant() == Variant::kAvx2) return kMatmulAvx2;
#endif
  return kMatmulPortable;
}

namespace {

constexpr int64_t kCacheLine = 64;  // bytes
// From so many rows on a tile's results are made aside, some at once, and then put where they go: kernels that store
// them there, in rows far from each other, take a tenth longer.
constexpr int64_t kRowsAside = 32;
constexpr int64_t kBlocksOfASpan = 16;  // 16 KiB as bytes: half of a first cache

// Memory that a thread keeps for the next call.
template <class T>
T* scratch(std::vector<T>& memory, int64_t size) {
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

// Room for what a weight multiplies, until the calling thread's next one in the same place: 0 or 1.
RoundedRows rounded_rows(const TiledWeight& weight, int64_t rows, Activations how, int place) {
  static thread_local std::vector<uint8_t> memory[2];
  RoundedRows out{nullptr, weight.blocks, weight.subs, how == Activations::kTwoPlanes ? 2 : 1};
  out.bytes = scratch(memory[place], rows * out.row_bytes());
  return out;
}

// How many blocks, or halves of one, share a factor of each kind.
int64_t spread_of(const TiledWeight& weight, const Factors& factors) {
  return weight.blocks * weight.subs / factors.groups;
}

// Asks for the factors of a tile, which the processor does not foresee: they lie apart from the codes.
void prefetch(const Factors& factors, int64_t tile) {
  if (factors.values == nullptr) return;
  const int64_t bytes = factors.groups * kTile * size_of(factors.type);
  const char* from = static_cast<const char*>(factors.values) + tile * bytes;
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(from + at);
}

// `tile_product` of all blocks. Spread codes are joined in spans that the first cache has room for.
void rounded_product(const MatmulKernels& kernels, const TiledWeight& weight, int64_t tile, const float* scales,
                     const float* mins, const RoundedRows& x, int64_t first_row, int64_t rows, float* y, int64_t ld) {
  static thread_local std::vector<uint8_t> joined_memory;
  const uint8_t* codes = weight.codes + tile * weight.tile_bytes();
  if (!is_spread(weight.kind)) {
    return kernels.tile_product(weight, codes, scales, mins, x, {0, weight.blocks}, first_row, rows, y, ld);
  }
  TiledWeight joined = weight;
  joined.kind = Codes::kBytes;
  uint8_t* bytes = scratch(joined_memory, kBlocksOfASpan * joined.block_bytes());
  for (Blocks span{0, 0}; span.first < weight.blocks; span.first += span.count) {
    span.count = std::min(kBlocksOfASpan, weight.blocks - span.first);
    kernels.join_codes(weight.kind, codes + span.first * weight.block_bytes(), span.count, bytes);
    const int64_t factors = span.first * weight.subs * kTile;  // in front of the span
    kernels.tile_product(joined, bytes, scales + factors, mins == nullptr ? nullptr : mins + factors, x, span, first_row,
                         rows, y, ld);
  }
}

// Puts a tile's results where they go, rows of N numbers, with what they are added to, which may lie there.
void put_tile(const float* from, int64_t ld, const float* residual, int64_t rows, int64_t columns, int64_t N, float* to) {
  for (int64_t row = 0; row < rows; row++, from += ld, to += N) {
    const float* added = residual == nullptr ? nullptr : residual + row * N;
    if (columns < kTile) {
      for (int64_t i = 0; i < columns; i++) to[i] = added == nullptr ? from[i] : from[i] + added[i];
      continue;
    }
    float whole[kTile];  // of a size that is known: these loops are a few instructions
    std::memcpy(whole, from, sizeof whole);
    if (added != nullptr) {
      for (int i = 0; i < kTile; i++) whole[i] += added[i];
    }
    std::memcpy(to, whole, sizeof whole);
  }
}

// Row `row` of x as a product takes it: itself, or normed, until the calling thread's next one.
const float* input_row(const Inputs& x, int64_t row, int64_t K) {
  static thread_local std::vector<float> memory;
  const float* from = x.rows + row * K;
  if (x.scale == nullptr) return from;
  float* normed = scratch(memory, K);
  rowwise_kernels().rms_norm(from, x.scale, K, x.eps, normed);
  return normed;
}

// What all tiles multiply: rounded rows of x, or rows as they are.
struct Operand {
  const RoundedRows* rounded;
  const float* exact;  // where they are not rounded
  int64_t K;
};

// Factors of a tile, decoded for many rows.
struct DecodedTile {
  const float* scales;
  const float* mins;  // null where there are none
};

// Into memory of the calling thread, until its next tile in the same place: 0, or 1 for a second one.
DecodedTile decode_tile(const MatmulKernels& kernels, const TiledWeight& weight, int64_t tile, int place) {
  static thread_local std::vector<float> scale_memory[2], min_memory[2];
  const int64_t size = weight.blocks * weight.subs * kTile;
  float* scales = scratch(scale_memory[place], size);
  kernels.decode_factors(weight.scales, tile, spread_of(weight, weight.scales), scales);
  float* mins = nullptr;
  if (weight.mins.values != nullptr) {
    mins = scratch(min_memory[place], size);
    kernels.decode_factors(weight.mins, tile, spread_of(weight, weight.mins), mins);
  }
  if (tile + 1 < weight.tiles()) {
    prefetch(weight.scales, tile + 1);
    prefetch(weight.mins, tile + 1);
  }
  return {scales, mins};
}

// One tile by some rows, `ld` floats from row to row.
void decoded_product(const MatmulKernels& kernels, const TiledWeight& weight, int64_t tile, const DecodedTile& factors,
                     const Operand& x, int64_t first_row, int64_t rows, float* to, int64_t ld) {
  static thread_local std::vector<float> exact_memory;
  if (x.rounded != nullptr) {
    return rounded_product(kernels, weight, tile, factors.scales, factors.mins, *x.rounded, first_row, rows, to, ld);
  }
  float* values = scratch(exact_memory, weight.blocks * kBlock * kTile);
  kernels.exact_tile_product(weight, tile, factors.scales, factors.mins, x.exact + first_row * x.K, x.K, rows, values, to,
                             ld);
}

// The same of few rows, with factors as they are stored where there is code for them.
void few_rows(const MatmulKernels& kernels, const TiledWeight& weight, int64_t tile, const Operand& x, int64_t first_row,
              int64_t rows, float* to, int64_t ld) {
  if (x.rounded != nullptr && kernels.stored_tile_product(weight, tile, *x.rounded, first_row, rows, to, ld)) return;
  decoded_product(kernels, weight, tile, decode_tile(kernels, weight, tile, 0), x, first_row, rows, to, ld);
}

float* memory_aside(int64_t rows) {
  static thread_local std::vector<float> memory;
  return scratch(memory, rows * kTile);
}

// How many rows of a tile are made aside at once: where they go is asked for before, and a core drops what it is asked
// for beyond some dozens of lines. Spread codes are joined anew for each call.
int64_t rows_aside(const TiledWeight& weight, const Operand& x, int64_t rows) {
  return x.rounded == nullptr || is_spread(weight.kind) ? rows : std::min(rows, kRowsAtOnce);
}

// Asks for one tile's columns of some rows, which lie far from each other, while products are still made.
void prefetch_rows(const float* from, int64_t N, int64_t rows) {
  constexpr int kSecondCache = 2;
  for (int64_t row = 0; row < rows; row++, from += N) {
    __builtin_prefetch(from, 0, kSecondCache);
    __builtin_prefetch(from + kTile / 2, 0, kSecondCache);
  }
}

// One tile by some rows, put where it goes.
void one_tile(const MatmulKernels& kernels, const TiledWeight& weight, int64_t tile, const Operand& x,
              int64_t first_row, int64_t rows, const Outputs& y) {
  const int64_t columns = std::min<int64_t>(kTile, weight.N - tile * kTile), place = first_row * weight.N + tile * kTile;
  float* out = y.rows + place;
  const float* residual = y.residual == nullptr ? nullptr : y.residual + place;
  if (rows < kRowsAside) {
    const bool aside = columns < kTile || residual != nullptr;  // the last tile reaches over the last column
    float* to = aside ? memory_aside(rows) : out;
    const int64_t ld = aside ? kTile : weight.N;
    few_rows(kernels, weight, tile, x, first_row, rows, to, ld);
    if (aside) put_tile(to, ld, residual, rows, columns, weight.N, out);
    return;
  }
  const DecodedTile factors = decode_tile(kernels, weight, tile, 0);
  const int64_t at_once = rows_aside(weight, x, rows);
  float* to = memory_aside(at_once);
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t count = std::min(at_once, rows - row), at = row * weight.N;
    prefetch_rows(out + at, weight.N, count);
    if (residual != nullptr && residual != out) prefetch_rows(residual + at, weight.N, count);
    decoded_product(kernels, weight, tile, factors, x, first_row + row, count, to, kTile);
    put_tile(to, kTile, residual == nullptr ? nullptr : residual + at, count, columns, weight.N, out + at);
  }
}

// Where what gates make of ups goes: one of both.
struct GatedOutputs {
  Gate gate;
  int64_t F;
  float* rows;                 // [rows, F]
  const RoundedRows* rounded;  // as the next product takes it: a tile is one of its blocks
};

// Asks for where `put_gated` will put one tile of some rows.
void prefetch_gated(const GatedOutputs& y, int64_t tile, int64_t first_row, int64_t rows) {
  if (y.rounded == nullptr) return prefetch_rows(y.rows + first_row * y.F + tile * kTile, y.F, rows);
  for (int64_t row = first_row; row < first_row + rows; row++) __builtin_prefetch(y.rounded->numbers(row, tile), 1);
}

void put_gated(const MatmulKernels& kernels, const float* gates, const float* ups, const GatedOutputs& y, int64_t tile,
               int64_t first_row, int64_t rows) {
  static_assert(kTile == kBlock);
  const RowwiseKernels& rowwise = rowwise_kernels();
  for (int64_t row = first_row; row < first_row + rows; row++, gates += kTile, ups += kTile) {
    float made[kTile];
    float* to = y.rounded == nullptr ? y.rows + row * y.F + tile * kTile : made;
    rowwise.gated(gates, ups, kTile, y.gate, to);
    if (y.rounded != nullptr) kernels.round_group(made, *y.rounded, row, tile);
  }
}

// A tile of gates and that of their ups by some rows: both are needed at once, and neither is written.
void gated_tile(const MatmulKernels& kernels, const TiledWeight& weight, int64_t tile, const Operand& x,
                int64_t first_row, int64_t rows, const GatedOutputs& y) {
  const int64_t ups_tile = tile + y.F / kTile;
  if (rows < kRowsAside) {
    float* gates = memory_aside(2 * rows);
    float* ups = gates + rows * kTile;
    few_rows(kernels, weight, tile, x, first_row, rows, gates, kTile);
    few_rows(kernels, weight, ups_tile, x, first_row, rows, ups, kTile);
    return put_gated(kernels, gates, ups, y, tile, first_row, rows);
  }
  const DecodedTile of_gates = decode_tile(kernels, weight, tile, 0), of_ups = decode_tile(kernels, weight, ups_tile, 1);
  const int64_t at_once = rows_aside(weight, x, rows);
  float* gates = memory_aside(2 * at_once);
  float* ups = gates + at_once * kTile;
  for (int64_t row = first_row; row < first_row + rows; row += at_once) {
    const int64_t count = std::min(at_once, first_row + rows - row);
    prefetch_gated(y, tile, row, count);
    decoded_product(kernels, weight, tile, of_gates, x, row, count, gates, kTile);
    decoded_product(kernels, weight, ups_tile, of_ups, x, row, count, ups, kTile);
    put_gated(kernels, gates, ups, y, tile, row, count);
  }
}

// Rows of x as a product takes them, until the calling thread's next one.
Operand operand_of(const MatmulKernels& kernels, Pool& pool, const TiledWeight& weight, const Inputs& x, int64_t rows,
                   int64_t K, Activations how, RoundedRows* rounded) {
  static thread_local std::vector<float> exact_memory;
  if (how != Activations::kExact) {
    *rounded = rounded_rows(weight, rows, how, 0);
    for_each_row(pool, rows, K, [&](int64_t row) { kernels.round_row(input_row(x, row, K), K, how, *rounded, row); });
    return {rounded, nullptr, K};
  }
  if (x.scale == nullptr) return {nullptr, x.rows, K};
  float* normed = scratch(exact_memory, rows * K);
  for (int64_t row = 0; row < rows; row++) std::copy_n(input_row(x, row, K), K, normed + row * K);
  return {nullptr, normed, K};
}

// What rows that are not in use give: zeros, or what nothing is added to, which may be there already.
void fill_unused(const float* residual, int64_t rows, int64_t all_rows, int64_t width, float* y) {
  if (residual == y) return;
  if (residual == nullptr) {
    std::fill(y + rows * width, y + all_rows * width, 0.0f);
  } else {
    std::copy(residual + rows * width, residual + all_rows * width, y + rows * width);
  }
}

}  // namespace

int64_t rows_in_use(const float* x, int64_t rows, int64_t K) {
  while (rows > 0 && matmul_kernels().is_zero(x + (rows - 1) * K, K)) rows--;
  return rows;
}

void matmul(const TiledWeight& weight, const Inputs& x, int64_t all_rows, int64_t K, Activations how, const Outputs& y) {
  const MatmulKernels& kernels = matmul_kernels();
  Pool& pool = Pool::shared();
  const int64_t rows = rows_in_use(x.rows, all_rows, K), width = y.is_gated ? weight.N / 2 : weight.N;
  fill_unused(y.residual, rows, all_rows, width, y.rows);
  if (rows == 0) return;
  RoundedRows rounded;
  const Operand operand = operand_of(kernels, pool, weight, x, rows, K, how, &rounded);
  if (y.is_gated) {
    const GatedOutputs gated{y.gate, width, y.rows, nullptr};
    for_each_tile(pool, rows, width / kTile, [&](int64_t first_row, int64_t count, int64_t tile) {
      gated_tile(kernels, weight, tile, operand, first_row, count, gated);
    });
    return;
  }
  for_each_tile(pool, rows, weight.tiles(), [&](int64_t first_row, int64_t count, int64_t tile) {
    one_tile(kernels, weight, tile, operand, first_row, count, y);
  });
}

void gated_net(const TiledWeight& up, const TiledWeight& down, const Inputs& x, int64_t all_rows, int64_t K,
               Activations how, Gate gate, const float* residual, float* y) {
  const MatmulKernels& kernels = matmul_kernels();
  Pool& pool = Pool::shared();
  const int64_t rows = rows_in_use(x.rows, all_rows, K), F = up.N / 2;
  fill_unused(residual, rows, all_rows, down.N, y);
  if (rows == 0) return;
  RoundedRows rounded;
  const Operand operand = operand_of(kernels, pool, up, x, rows, K, how, &rounded);
  const RoundedRows made = rounded_rows(down, rows, how, 1);
  const GatedOutputs gated{gate, F, nullptr, &made};
  for_each_tile(pool, rows, F / kTile, [&](int64_t first_row, int64_t count, int64_t tile) {
    gated_tile(kernels, up, tile, operand, first_row, count, gated);
  });
  const Operand between{&made, nullptr, F};
  for_each_tile(pool, rows, down.tiles(), [&](int64_t first_row, int64_t count, int64_t tile) {
    one_tile(kernels, down, tile, between, first_row, count, {y, residual});
  });
}

namespace {

float factor_at(const Factors& factors, int64_t tile, int64_t group, int column) {
  // One vector of a variant's own way to read factors would do more work, and this is 1 of 32 columns.
  const int64_t at = (tile * factors.groups + group) * kTile + column;
  float value = 0;
  switch (factors.type) {
    case FactorType::kFloat32:
      value = static_cast<const float*>(factors.values)[at];
      break;
    case FactorType::kFloat16:
      value = float_of_half(static_cast<const uint16_t*>(factors.values)[at]);
      break;
    case FactorType::kBfloat16:
      value = float_of_bfloat(static_cast<const uint16_t*>(factors.values)[at]);
      break;
    case FactorType::kInt8:
      value = static_cast<const int8_t*>(factors.values)[at];
      break;
  }
  if (factors.supers == nullptr) return value;
  const int64_t super = group / (factors.groups / factors.supergroups);
  return value * factors.supers[(tile * factors.supergroups + super) * kTile + column];
}

}  // namespace

void read_rows(const TiledWeight& weight, const int32_t* ids, int64_t num_ids, int64_t K, float* out) {
  const int64_t width = kBlock / weight.subs;
  Pool::shared().for_each(num_ids, [&](int64_t i) {
    float* to = out + i * K;
    if (ids[i] < 0 || ids[i] >= weight.N) {
      std::fill_n(to, K, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    const int64_t tile = ids[i] / kTile;
    const int column = ids[i] % kTile;
    for (int64_t start = 0; start < K; start += width) {
      const int64_t part = start / width;
      const float scale = factor_at(weight.scales, tile, part / spread_of(weight, weight.scales), column);
      const float min = weight.mins.values == nullptr
                            ? 0.0f
                            : factor_at(weight.mins, tile, part / spread_of(weight, weight.mins), column);
      for (int64_t k = start; k < std::min(K, start + width); k++) {
        to[k] = scale * static_cast<float>(number_at(weight, tile, k, column)) - min;
      }
    }
  });
}

}  // namespace atoma
