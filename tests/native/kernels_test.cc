// The kernels by themselves, for a build with sanitizers: every variant of this CPU against sums in double, in memory of
// exactly the size that the layout says, and the pool under callers that come and go. Prints what fails; returns 1 then.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "dense.h"
#include "half.h"
#include "matmul.h"
#include "pack.h"
#include "pool.h"
#include "rowwise.h"
#include "sampling.h"
#include "variant.h"

namespace {

using namespace atoma;

int failures = 0;

void check(bool holds, const char* what, int variant, int kind, int64_t rows) {
  if (holds) return;
  std::printf("%s: variant %d, codes %d, rows %lld\n", what, variant, kind, static_cast<long long>(rows));
  failures++;
}

// Memory whose neighbours are out of bounds.
template <class T>
std::unique_ptr<T[]> exactly(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

void products(int variant, Codes kind, int subs, bool with_mins, FactorType type, int64_t K = 80) {
  std::mt19937 random(7);
  const int64_t N = 40;
  TiledWeight weight;
  weight.kind = kind;
  weight.N = N;
  weight.blocks = (K + kBlock - 1) / kBlock;  // of 80 inputs, the last one half full
  weight.subs = subs;
  weight.zero = kind == Codes::kBits8 || kind == Codes::kTable4 ? 0 : 1 << (bits_of(kind) - 1);
  for (int i = 0; i < 16; i++) weight.table[i] = static_cast<uint8_t>(random());
  const int64_t bytes = weight.tiles() * weight.tile_bytes();
  const auto codes = exactly<uint8_t>(bytes);
  for (int64_t i = 0; i < bytes; i++) codes[i] = static_cast<uint8_t>(random());
  weight.codes = codes.get();
  const int64_t groups = weight.blocks * subs, size = weight.tiles() * groups * kTile;
  const auto floats = exactly<float>(size);
  const auto halves = exactly<uint16_t>(size);
  const auto integers = exactly<int8_t>(size);
  const auto supers = exactly<float>(weight.tiles() * kTile);
  for (int64_t i = 0; i < size; i++) {
    halves[i] = static_cast<uint16_t>(0x2000 + random() % 0x1900);  // 0.008 to 0.8
    floats[i] = type == FactorType::kFloat16 ? float_of_half(halves[i]) : static_cast<float>(random() % 100) * 0.01f;
    integers[i] = static_cast<int8_t>(random() % 100);
  }
  for (int64_t i = 0; i < weight.tiles() * kTile; i++) supers[i] = 0.01f;
  const bool whole = type == FactorType::kInt8;
  weight.scales.values = floats.get();
  if (whole) weight.scales.values = integers.get();
  if (type == FactorType::kFloat16) weight.scales.values = halves.get();
  weight.scales.type = type;
  weight.scales.groups = groups;
  if (whole) {
    weight.scales.supers = supers.get();
    weight.scales.supergroups = 1;
  }
  if (with_mins) weight.mins = weight.scales;

  const auto values = exactly<double>(N * K);
  for (int64_t column = 0; column < N; column++) {
    for (int64_t k = 0; k < K; k++) {
      const int64_t at = (column / kTile * groups + k * subs / kBlock) * kTile + column % kTile;
      const double scale = whole ? integers[at] * 0.01 : floats[at];
      const double number = number_at(weight, column / kTile, k, static_cast<int>(column % kTile));
      values[column * K + k] = scale * number - (with_mins ? scale : 0.0);
    }
  }
  for (int64_t rows : {1, 2, 3, 5, 9, 131}) {
    // Many rows take what is the same for all kinds: tiles made aside, several spans of rows.
    if (rows > 100 && (kind != Codes::kBits4 || type != FactorType::kFloat16 || subs == 2)) continue;
    const auto x = exactly<float>(rows * K);
    const auto y = exactly<float>(rows * N);
    for (int64_t i = 0; i < rows * K; i++) x[i] = static_cast<float>(random() % 2001) * 0.001f - 1.0f;
    for (Activations how : {Activations::kGroups, Activations::kTwoPlanes, Activations::kTokens, Activations::kExact}) {
      matmul(weight, {x.get()}, rows, K, how, {y.get()});
      const double tolerance = how == Activations::kTwoPlanes ? 1e-4 : how == Activations::kExact ? 1e-5 : 3e-2;
      double worst = 0, largest = 0;
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t column = 0; column < N; column++) {
          double sum = 0;
          for (int64_t k = 0; k < K; k++) sum += x[row * K + k] * values[column * K + k];
          worst = std::fmax(worst, std::fabs(sum - y[row * N + column]));
          largest = std::fmax(largest, std::fabs(sum));
        }
      }
      check(worst < tolerance * largest, "product", variant, static_cast<int>(kind), rows);
    }
  }
  const int32_t ids[] = {0, 39, 40, -1};
  const auto out = exactly<float>(4 * K);
  read_rows(weight, ids, 4, K, out.get());
  check(std::isfinite(out[0]) && std::isnan(out[2 * K]) && std::isnan(out[3 * K]), "rows", variant,
        static_cast<int>(kind), 4);
}

// A norm in front of a product, and a gate or a residual behind it, against calls of their own: the same bits.
void joined_products(int variant) {
  std::mt19937 random(13);
  const int64_t N = 128, K = 80;
  TiledWeight weight;
  weight.N = N;
  weight.blocks = (K + kBlock - 1) / kBlock;
  const int64_t bytes = weight.tiles() * weight.tile_bytes(), size = weight.tiles() * weight.blocks * kTile;
  const auto codes = exactly<uint8_t>(bytes);
  for (int64_t i = 0; i < bytes; i++) codes[i] = static_cast<uint8_t>(random());
  const auto scales = exactly<float>(size), scale = exactly<float>(K);
  std::fill_n(scales.get(), size, 0.01f);
  weight.codes = codes.get();
  weight.scales = {scales.get(), nullptr, FactorType::kFloat32, weight.blocks, 0};
  const auto number = [&] { return static_cast<float>(random() % 2001) * 0.001f - 1.0f; };
  std::generate_n(scale.get(), K, number);
  for (int64_t rows : {1, 5, 33}) {
    const auto x = exactly<float>(rows * K), normed = exactly<float>(rows * K), apart = exactly<float>(rows * N);
    const auto residual = exactly<float>(rows * N), y = exactly<float>(rows * N);
    const auto gated_apart = exactly<float>(rows * N / 2), gated_y = exactly<float>(rows * N / 2);
    std::generate_n(x.get(), rows * K, number);
    std::generate_n(residual.get(), rows * N, number);
    for (Activations how : {Activations::kGroups, Activations::kExact}) {
      const Inputs inputs{x.get(), scale.get(), 1e-5f};
      rms_norm(x.get(), scale.get(), rows, K, 1e-5f, normed.get());
      matmul(weight, {normed.get()}, rows, K, how, {apart.get()});
      gated(apart.get(), rows, N / 2, Gate::kSilu, gated_apart.get());
      matmul(weight, inputs, rows, K, how, {y.get(), residual.get()});
      matmul(weight, inputs, rows, K, how, {gated_y.get(), nullptr, true, Gate::kSilu});
      bool same = true;
      for (int64_t i = 0; i < rows * N; i++) same &= y[i] == apart[i] + residual[i];
      for (int64_t i = 0; i < rows * N / 2; i++) same &= gated_y[i] == gated_apart[i];
      check(same, "joined product", variant, -1, rows);
    }
  }
}

// A gated net, written over its own input, against two products: the same bits.
void gated_nets(int variant) {
  std::mt19937 random(17);
  const int64_t D = 96, F = 64;
  std::vector<std::unique_ptr<uint8_t[]>> codes;
  std::vector<std::unique_ptr<float[]>> scales;
  const auto weight_of = [&](int64_t N, int64_t K, Codes kind, int subs) {
    TiledWeight weight;
    weight.kind = kind;
    weight.N = N;
    weight.blocks = K / kBlock;
    weight.subs = subs;
    const int64_t bytes = weight.tiles() * weight.tile_bytes(), groups = weight.blocks * subs;
    codes.push_back(exactly<uint8_t>(bytes));
    std::generate_n(codes.back().get(), bytes, [&] { return static_cast<uint8_t>(random()); });
    scales.push_back(exactly<float>(weight.tiles() * groups * kTile));
    std::fill_n(scales.back().get(), weight.tiles() * groups * kTile, 0.01f);
    weight.codes = codes.back().get();
    weight.scales = {scales.back().get(), nullptr, FactorType::kFloat32, groups, 0};
    return weight;
  };
  const auto up = weight_of(2 * F, D, Codes::kBits4, 1);
  for (const TiledWeight& down : {weight_of(D, F, Codes::kBits4, 1), weight_of(D, F, Codes::kBits6, 2)}) {
    for (int64_t rows : {1, 7, 45, 150}) {
      for (Activations how : {Activations::kGroups, Activations::kTwoPlanes}) {
        const auto x = exactly<float>(rows * D), between = exactly<float>(rows * F), apart = exactly<float>(rows * D);
        std::generate_n(x.get(), rows * D, [&] { return static_cast<float>(random() % 2001) * 0.001f - 1.0f; });
        matmul(up, {x.get()}, rows, D, how, {between.get(), nullptr, true, Gate::kSilu});
        matmul(down, {between.get()}, rows, F, how, {apart.get(), x.get()});
        gated_net(up, down, {x.get()}, rows, D, how, Gate::kSilu, x.get(), x.get());
        check(std::equal(apart.get(), apart.get() + rows * D, x.get()), "gated net", variant, static_cast<int>(down.kind),
              rows);
      }
    }
  }
}

// Products with dense weights: of x as it is, or rounded to bfloat16 where the variant has instructions for that.
void dense_products(int variant, DenseType type, int64_t N, int64_t K) {
  std::mt19937 random(11);
  const auto floats = exactly<float>(N * K);
  const auto words = exactly<uint16_t>(N * K);
  for (int64_t i = 0; i < N * K; i++) {
    words[i] = static_cast<uint16_t>(random() % 0x3c01 | (random() & 0x8000));  // below 1 in either type
    floats[i] = type == DenseType::kFloat16 ? float_of_half(words[i]) : float_of_bfloat(words[i]);
  }
  DenseWeight weight;
  weight.values = type == DenseType::kFloat32 ? static_cast<const void*>(floats.get()) : words.get();
  weight.type = type;
  weight.N = N;
  weight.K = K;
  const bool has_bfloat = static_cast<Variant>(variant) == Variant::kAvx512Bf16 && type == DenseType::kBfloat16;
  for (int64_t rows : {1, 2, 3, 5, 17}) {
    const auto x = exactly<float>(rows * K);
    const auto y = exactly<float>(rows * N);
    for (int64_t i = 0; i < rows * K; i++) x[i] = static_cast<float>(random() % 2001) * 0.001f - 1.0f;
    for (bool may_round : {false, true}) {
      dense_matmul(weight, x.get(), rows, may_round, y.get());
      double worst = 0, largest = 0;
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t column = 0; column < N; column++) {
          double sum = 0;
          for (int64_t k = 0; k < K; k++) {
            sum += static_cast<double>(x[row * K + k]) * floats[column * K + k];
          }
          worst = std::fmax(worst, std::fabs(sum - y[row * N + column]));
          largest = std::fmax(largest, std::fabs(sum));
        }
      }
      // Rounding is seen, and no larger than a number of 8 bits allows.
      check(worst < (may_round && has_bfloat ? 1e-2 : 2e-6) * largest, "dense product", variant, -1, rows);
      if (may_round && has_bfloat) check(worst > 1e-5 * largest, "rounded dense product", variant, -1, rows);
    }
  }
}

// Norms and gated activations of a few rows, the last of them zeros.
void rowwise_functions(int variant, int64_t width) {
  constexpr int64_t kRows = 3;
  std::mt19937 random(5);
  const auto x = exactly<float>(kRows * 2 * width), scale = exactly<float>(2 * width);
  const auto norms = exactly<float>(kRows * 2 * width), gates = exactly<float>(kRows * width);
  for (int64_t i = 0; i < 2 * width; i++) scale[i] = static_cast<float>(random() % 100) * 0.01f;
  for (int64_t i = 0; i < kRows * 2 * width; i++) {
    x[i] = i / (2 * width) == kRows - 1 ? 0.0f : static_cast<float>(random() % 2001) * 0.005f - 5.0f;
  }
  rms_norm(x.get(), scale.get(), kRows, 2 * width, 1e-5f, norms.get());
  gated(x.get(), kRows, width, Gate::kSilu, gates.get());
  double worst = 0;
  for (int64_t row = 0; row < kRows; row++) {
    const float* own = x.get() + row * 2 * width;
    double square = 0;
    for (int64_t i = 0; i < 2 * width; i++) square += static_cast<double>(own[i]) * own[i];
    const double factor = 1 / std::sqrt(square / (2.0 * width) + 1e-5);
    for (int64_t i = 0; i < 2 * width; i++) {
      worst = std::fmax(worst, std::fabs(own[i] * factor * scale[i] - norms[row * 2 * width + i]));
    }
    for (int64_t i = 0; i < width; i++) {
      const double due = own[i] / (1 + std::exp(-static_cast<double>(own[i]))) * own[width + i];
      worst = std::fmax(worst, std::fabs(due - gates[row * width + i]));
    }
  }
  check(worst < 1e-5, "norm or gate", variant, -1, width);
  // Heads that do not turn, as their sines are 0: what comes out is what went in.
  const int64_t half = width / 2;
  const auto cos = exactly<float>(kRows * half), sin = exactly<float>(kRows * half);
  std::fill_n(cos.get(), kRows * half, 1.0f);
  std::fill_n(sin.get(), kRows * half, 0.0f);
  const auto qkv = exactly<float>(kRows * 4 * width), q = exactly<float>(kRows * 2 * width);
  const auto k = exactly<float>(kRows * width), v = exactly<float>(kRows * width);
  for (int64_t i = 0; i < kRows * 4 * width; i++) qkv[i] = static_cast<float>(i + 1);
  rotate_heads({1, 2, width, half, nullptr, nullptr, 0.0f}, qkv.get(), cos.get(), sin.get(), kRows, q.get(), k.get(),
               v.get());
  bool same = true;
  for (int64_t row = 0; row < kRows; row++) {
    const float* own = qkv.get() + row * 4 * width;
    same &= std::equal(own, own + 2 * width, q.get() + row * 2 * width);
    same &= std::equal(own + 2 * width, own + 3 * width, k.get() + row * width);
    same &= std::equal(own + 3 * width, own + 4 * width, v.get() + row * width);
  }
  check(same, "heads", variant, -1, width);
}

// Evenly spaced numbers draw each token as often as it is likely among those that filters keep; sums and ranks.
// Some tokens are barred, many tie, and the last row is not active.
void draws(int variant, int64_t V, int32_t top_k, float top_p, float min_p) {
  constexpr int64_t kDraws = 512, kRows = kDraws + 1;
  std::mt19937 random(3);
  const auto logits = exactly<float>(kRows * V);
  for (int64_t v = 0; v < V; v++) {
    logits[v] = v % 5 == 2 ? -INFINITY : static_cast<float>(random() % (v % 2 == 0 ? 4000 : 40) * 2) * 0.001f;
  }
  for (int64_t i = 1; i < kDraws; i++) std::copy_n(logits.get(), V, logits.get() + i * V);
  std::fill_n(logits.get() + kDraws * V, V, NAN);
  const float largest = *std::max_element(logits.get(), logits.get() + V);
  const auto filled = [&](auto value) {
    auto all = exactly<decltype(value)>(kRows);
    std::fill_n(all.get(), kRows, value);
    return all;
  };
  const auto top = filled(largest), temperature = filled(0.8f), p = filled(top_p);
  const float lowest = min_p > 0 ? largest + 0.8f * std::log(min_p) : -INFINITY;
  const auto k = filled(top_k), tokens = filled(int32_t{-1});
  const auto floor = filled(lowest);
  const auto bits = filled(uint32_t{5});
  const auto active = filled(false);
  for (int64_t i = 0; i < kDraws; i++) {
    bits[i] = static_cast<uint32_t>(i * (int64_t{1} << 32) / kDraws);
    active[i] = true;
  }
  draw_tokens({logits.get(), top.get(), temperature.get(), floor.get(), k.get(), p.get(), bits.get(), active.get()}, kRows,
              V, tokens.get());
  std::vector<int64_t> order(V);
  for (int64_t v = 0; v < V; v++) order[v] = v;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  const auto weight = [&](int64_t v) { return std::exp((static_cast<double>(logits[v]) - largest) / 0.8); };
  float cut = std::fmax(lowest, top_k > 0 && top_k < V ? logits[order[top_k - 1]] : -INFINITY);
  double all = 0, sum = 0;
  for (int64_t v = 0; v < V; v++) all += logits[v] >= cut ? weight(v) : 0;
  for (int64_t i = 0; top_p < 1 && i < V && sum < all * top_p; i++) {
    sum += weight(order[i]);
    if (sum >= all * top_p) cut = logits[order[i]];
  }
  double kept = 0;
  for (int64_t v = 0; v < V; v++) kept += logits[v] >= cut ? weight(v) : 0;
  std::vector<int> counts(V);
  bool holds = tokens[kDraws] == 0;
  for (int64_t i = 0; i < kDraws; i++) {
    holds &= tokens[i] >= 0 && tokens[i] < V && logits[tokens[i]] >= cut;
    if (holds) counts[tokens[i]]++;
  }
  for (int64_t v = 0; v < V; v++) {
    const double due = logits[v] >= cut ? kDraws * weight(v) / kept : 0;
    holds &= std::fabs(counts[v] - due) < 1.1;
  }
  check(holds, "draws", variant, top_k, V);

  const auto token = filled(static_cast<int32_t>(V / 2));
  const auto norms = exactly<float>(kDraws);
  const auto ranks = exactly<int32_t>(kDraws);
  survey_rows({logits.get(), top.get(), token.get(), active.get()}, 3, V, norms.get(), ranks.get());
  double exact = 0;
  int before = 0;
  for (int64_t v = 0; v < V; v++) {
    exact += std::exp(static_cast<double>(logits[v]));
    before += logits[v] > logits[V / 2] || (logits[v] == logits[V / 2] && v < V / 2);
  }
  check(std::fabs(norms[2] - std::log(exact)) < 1e-5 && ranks[2] == before + 1, "survey", variant, -1, V);
}

// Codes and factors of scattered rows come back from where they were put, in memory of exactly their size.
void packing(Codes kind) {
  std::mt19937 random(5);
  const int bits = bits_of(kind);
  const int64_t N = 40, K = 80, groups = 3;
  TiledWeight weight;
  weight.kind = kind;
  weight.N = N;
  weight.blocks = 3;
  const auto rows = exactly<uint8_t>(N * K);
  const auto to = exactly<int64_t>(N);
  const auto codes = exactly<uint8_t>(weight.tiles() * weight.tile_bytes());
  for (int64_t i = 0; i < N * K; i++) rows[i] = static_cast<uint8_t>(random() % (1 << bits));
  for (int64_t i = 0; i < N; i++) to[i] = i * 7 % N;
  pack_codes(rows.get(), N, K, bits, to.get(), weight.blocks, codes.get());
  weight.codes = codes.get();
  const auto factors = exactly<uint16_t>(N * groups);
  const auto packed = exactly<uint16_t>(weight.tiles() * groups * kTile);
  for (int64_t i = 0; i < N * groups; i++) factors[i] = static_cast<uint16_t>(random());
  pack_factors(factors.get(), N, groups, 2, to.get(), groups, packed.get());
  bool holds = true;
  for (int64_t i = 0; i < N; i++) {
    const int64_t tile = to[i] / kTile;
    const int column = static_cast<int>(to[i] % kTile);
    const int zero = bits == 8 ? 128 : 0;
    for (int64_t k = 0; k < K; k++) holds &= number_at(weight, tile, k, column) + zero == rows[i * K + k];
    for (int64_t g = 0; g < groups; g++) holds &= packed[(tile * groups + g) * kTile + column] == factors[i * groups + g];
  }
  check(holds, "packing", -1, static_cast<int>(kind), N);
}

// Two callers at once, jobs of all sizes: every piece runs once.
void pool() {
  Pool pool(4);
  const auto caller = [&](int seed) {
    std::mt19937 random(seed);
    for (int round = 0; round < 2000; round++) {
      const int64_t count = random() % 40;
      std::vector<std::atomic<int>> runs(count);
      pool.for_each(count, [&](int64_t i) { runs[i].fetch_add(1); });
      for (const auto& run : runs) check(run.load() == 1, "a piece did not run once", -1, -1, count);
    }
  };
  std::thread other(caller, 1);
  caller(2);
  other.join();
}

}  // namespace

int main() {
  set_pool_threads(3);
  for (int variant = 0; variant < kNumVariants; variant++) {
    if (!is_supported(static_cast<Variant>(variant))) continue;
    force_variant(static_cast<Variant>(variant));
    for (int kind_number = 0; kind_number < kStoredCodes; kind_number++) {
      const auto kind = static_cast<Codes>(kind_number);
      for (int subs : {1, 2}) {
        products(variant, kind, subs, false, FactorType::kFloat32);
        products(variant, kind, subs, true, FactorType::kInt8);
        products(variant, kind, subs, true, FactorType::kFloat16);
        if (is_spread(kind)) products(variant, kind, subs, true, FactorType::kFloat32, 20 * kBlock);  // two spans
      }
    }
    for (int64_t V : {1, 100, 128, 300, 1500}) {
      draws(variant, V, 0, 1, 0);
      draws(variant, V, 7, 1, 0);
      draws(variant, V, 0, 0.8f, 0);
      draws(variant, V, 0, 1, 0.2f);
      draws(variant, V, 50, 0.5f, 0.05f);
    }
    for (int64_t width : {1, 31, 96}) rowwise_functions(variant, width);
    joined_products(variant);
    gated_nets(variant);
    for (DenseType type : {DenseType::kFloat32, DenseType::kBfloat16, DenseType::kFloat16}) {
      dense_products(variant, type, 37, 70);
      dense_products(variant, type, 3, 1500);  // longer than what is asked for ahead
    }
  }
  for (Codes kind : {Codes::kBits8, Codes::kBits6, Codes::kBits5, Codes::kBits4, Codes::kBits3, Codes::kBits2}) {
    packing(kind);
  }
  pool();
  std::printf(failures == 0 ? "all kernels hold\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
