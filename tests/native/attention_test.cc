// The attention kernels against sums in double precision, on every instruction set of this machine. Run by
// tests/native, also under the sanitizers: every array has its exact size, and whatever no kernel may read is NaN.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "paged_attention.h"
#include "pool.h"
#include "variant.h"

using namespace atoma;

namespace {

struct Shape {
  int N, K, H, S, window;
  float softcap;
};

constexpr int kNone = 1 << 30;
int failures = 0;

void check(bool ok, const char* what, const char* promise) {
  if (ok) return;
  failures++;
  std::printf("FAILED %s: %s\n", what, promise);
}

size_t size_of(KvFormat format) {
  if (format == KvFormat::kFloat32) return 4;
  return format == KvFormat::kBFloat16 || format == KvFormat::kHalf ? 2 : 1;
}

// A step's arrays. `contexts` are written one token at a time, as a prefill would; the last tokens of each are this
// step's: one where it decodes.
class Step {
 public:
  Step(const Shape& shape, KvFormat format, const std::vector<int>& lengths, const std::vector<int>& counts, int decodes)
      : shape_(shape), lengths_(lengths) {
    const int B = static_cast<int>(lengths.size());
    int T = 3, pages = 1, width = 1;  // three tokens of padding
    for (int row = 0; row < B; row++) {
      T += counts[row];
      pages += lengths[row] / shape.S + 1;
      width = std::max(width, lengths[row] / shape.S + 1);
    }
    const size_t slots = static_cast<size_t>(pages) * shape.K * shape.S;
    k_pages_.assign(slots * shape.H * size_of(format), 0x7F);  // NaN, or a large code
    if (format == KvFormat::kFloat32 || format == KvFormat::kHalf || format == KvFormat::kBFloat16)
      std::memset(k_pages_.data(), 0xFF, k_pages_.size());
    v_pages_ = k_pages_;
    k_scale_.assign(slots, NAN);
    v_scale_.assign(slots, NAN);
    table_.assign(static_cast<size_t>(B) * width, -77);
    std::mt19937 random(shape.N + shape.H);
    std::normal_distribution<float> normal;
    int next = pages - 1;
    k_.resize(B);
    v_.resize(B);
    for (int row = 0; row < B; row++) {
      for (int at = 0; at < lengths[row]; at += shape.S) table_[row * width + at / shape.S] = next--;
      for (auto* values : {&k_[row], &v_[row]}) {
        values->resize(static_cast<size_t>(lengths[row]) * shape.K * shape.H);
        for (float& x : *values) x = normal(random);
      }
    }
    q_.resize(static_cast<size_t>(T) * shape.N * shape.H);
    for (float& x : q_) x = normal(random);
    const bool scaled = size_of(format) == 1;
    problem_ = {.T = T, .B = B, .N = shape.N, .K = shape.K, .H = shape.H, .P = pages, .S = shape.S, .W = width,
                .q = q_.data(), .k = nullptr, .v = nullptr, .format = format,
                .k_pages = k_pages_.data(), .v_pages = v_pages_.data(),
                .k_scale = scaled ? k_scale_.data() : nullptr, .v_scale = scaled ? v_scale_.data() : nullptr,
                .page = nullptr, .slot = nullptr, .page_table = table_.data(), .decode_lengths = nullptr,
                .blocks = 0, .block_row = nullptr, .block_token = nullptr, .block_size = nullptr,
                .block_position = nullptr, .window = shape.window, .scale = 1 / std::sqrt(float(shape.H)),
                .softcap = shape.softcap, .out = nullptr};
    decode_lengths_.assign(B, 0);
    for (int row = 0, token = 0; row < B; token += counts[row], row++) {
      if (row < decodes) {
        decode_lengths_[row] = counts[row] ? lengths[row] : 0;
        token += 1 - counts[row];  // a row that decodes has its token, with work or without
        continue;
      }
      block_row_.push_back(row);
      block_token_.push_back(token);
      block_size_.push_back(counts[row]);
      block_position_.push_back(lengths[row] - counts[row]);
    }
  }

  // Writes the contexts that lie before this step, then runs the step.
  std::vector<float> run(const AttentionKernels& kernels, Pool& pool) {
    const Shape& s = shape_;
    AttentionProblem p = problem_;
    const size_t row_size = static_cast<size_t>(s.K) * s.H;
    std::vector<float> k(p.T * row_size, NAN), v(p.T * row_size, NAN), out(q_.size(), NAN);
    std::vector<int32_t> page(p.T, 0), slot(p.T, 0), positions(p.T, -1), rows(p.T, -1);
    auto place = [&](int token, int row, int at) {
      rows[token] = row;
      positions[token] = at;
      page[token] = table_[row * p.W + at / s.S];
      slot[token] = at % s.S;
      std::memcpy(&k[token * row_size], &k_[row][at * row_size], row_size * sizeof(float));
      std::memcpy(&v[token * row_size], &v_[row][at * row_size], row_size * sizeof(float));
    };
    p.k = k.data();
    p.v = v.data();
    p.page = page.data();
    p.slot = slot.data();
    for (int row = 0; row < p.B; row++)
      for (int at = 0; at < lengths_[row]; at++) {
        place(0, row, at);
        kernels.write_token(p, 0);
      }
    page.assign(p.T, 0);
    rows.assign(p.T, -1);
    for (int row = 0; row < p.B; row++)
      if (decode_lengths_[row]) place(row, row, lengths_[row] - 1);
    for (size_t b = 0; b < block_row_.size(); b++)
      for (int i = 0; i < block_size_[b]; i++) place(block_token_[b] + i, block_row_[b], block_position_[b] + i);
    p.decode_lengths = decode_lengths_.data();
    p.blocks = static_cast<int>(block_row_.size());
    p.block_row = block_row_.data();
    p.block_token = block_token_.data();
    p.block_size = block_size_.data();
    p.block_position = block_position_.data();
    p.out = out.data();
    attend(p, kernels, pool);
    rows_ = rows;
    positions_ = positions;
    return out;
  }

  // The largest difference from attention over what was written, in double precision.
  double error(const std::vector<float>& out) const {
    const Shape& s = shape_;
    double worst = 0;
    for (int token = 0; token < problem_.T; token++)
      for (int n = 0; n < s.N; n++) {
        std::vector<double> want(s.H, 0.0);
        if (rows_[token] >= 0) want = attention(token, n);
        for (int h = 0; h < s.H; h++) {
          const double off = std::fabs(out[(static_cast<size_t>(token) * s.N + n) * s.H + h] - want[h]);
          worst = off <= worst ? worst : off;  // NaN is worst
        }
      }
    return worst;
  }

 private:
  std::vector<double> attention(int token, int n) const {
    const Shape& s = shape_;
    const int row = rows_[token], position = positions_[token], kv_head = n / (s.N / s.K);
    const float* q = &q_[(static_cast<size_t>(token) * s.N + n) * s.H];
    auto at = [&](const std::vector<std::vector<float>>& values, int t) {
      return &values[row][(static_cast<size_t>(t) * s.K + kv_head) * s.H];
    };
    std::vector<double> sums(s.H, 0.0);
    double total = 0;
    for (int t = std::max(0, position - s.window + 1); t <= position; t++) {
      double logit = 0;
      for (int h = 0; h < s.H; h++) logit += double(q[h]) * at(k_, t)[h];
      logit *= problem_.scale;
      if (s.softcap != 0) logit = s.softcap * std::tanh(logit / s.softcap);
      const double weight = std::exp(logit);
      total += weight;
      for (int h = 0; h < s.H; h++) sums[h] += weight * at(v_, t)[h];
    }
    for (double& x : sums) x /= total;
    return sums;
  }

  Shape shape_;
  std::vector<int> lengths_;
  std::vector<uint8_t> k_pages_, v_pages_;
  std::vector<float> q_, k_scale_, v_scale_;
  std::vector<std::vector<float>> k_, v_;
  std::vector<int32_t> table_, decode_lengths_, block_row_, block_token_, block_size_, block_position_;
  std::vector<int32_t> rows_, positions_;
  AttentionProblem problem_;
};

// What rounding K and V to a format costs at most, for normal values: outputs are means of V with changed weights.
double tolerance(KvFormat format) {
  switch (format) {
    case KvFormat::kFloat32:
      return 5e-6;
    case KvFormat::kHalf:
      return 4e-3;
    case KvFormat::kBFloat16:
      return 3e-2;
    case KvFormat::kInt8:
      return 5e-2;
    default:
      return 4e-1;
  }
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check_shape(const Shape& shape, KvFormat format, const AttentionKernels& kernels, const char* variant) {
  char what[200];
  std::snprintf(what, sizeof(what), "%s, format %d, N %d K %d H %d S %d window %d softcap %g", variant,
                static_cast<int>(format), shape.N, shape.K, shape.H, shape.S, shape.window, shape.softcap);
  const int S = shape.S;
  Pool alone(1), three(3);
  Step decode(shape, format, {1, S - 1, S + 1, 0, 3 * S, 700}, {1, 1, 1, 0, 1, 1}, 6);
  Step mixed(shape, format, {300, S, 2 * S + 1, 75, 140}, {1, 1, 2 * S + 1, 17, 1}, 2);
  for (auto* step : {&decode, &mixed}) {
    const std::vector<float> out = step->run(kernels, alone);
    const double error = step->error(out);
    if (!(error <= tolerance(format))) std::printf("error %g ", error);
    check(error <= tolerance(format), what, step == &decode ? "decode" : "prefill behind decode");
    check(same(out, step->run(kernels, three)), what, "as many threads as one");
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {{3, 3, 64, 16, kNone, 0},  {9, 3, 64, 16, kNone, 0}, {7, 1, 80, 8, 100, 0},
                          {4, 1, 256, 32, 40, 0},    {8, 2, 96, 16, kNone, 5}, {14, 2, 128, 16, 129, 0},
                          {5, 1, 6, 4, kNone, 1.5f}, {64, 1, 20, 1, 77, 0},    {2, 2, 74, 5, kNone, 0}};
  const char* names[] = {"portable", "avx2", "avx512-vnni", "avx512-bf16"};
  for (int variant = 0; variant < kNumVariants; variant++) {
    if (!is_supported(static_cast<Variant>(variant))) continue;
    force_variant(static_cast<Variant>(variant));
    for (int format = 0; format < 5; format++)
      for (const Shape& shape : shapes)
        if (format == 0 || shape.H < 80)  // of heads, float32 shows as much as the others
          check_shape(shape, static_cast<KvFormat>(format), active_attention(static_cast<KvFormat>(format)),
                    names[variant]);
  }
  if (failures == 0) std::puts("all kernels hold");
  return failures != 0;
}
