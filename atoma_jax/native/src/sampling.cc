// The functions of sampling.h over all rows: what a filter keeps, scratch memory, and pieces for the pool.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "pool.h"
#include "variant.h"

namespace atoma {

extern const SamplingKernels kSamplingPortable;
#if defined(__x86_64__)
extern const SamplingKernels kSamplingAvx2, kSamplingAvx512;
#endif

namespace {

const SamplingKernels& sampling_kernels() {  // of the active variant
#if defined(__x86_64__)
  if (active_variant() >= Variant::kAvx512Vnni) return kSamplingAvx512;
  if (active_variant() == Variant::kAvx2) return kSamplingAvx2;
#endif
  return kSamplingPortable;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Weights are in units of about 2^-(23 + low bits): they add up to less than 2^(24 + low bits), below 2^31.
int low_bits(int64_t V) {
  const int64_t most = (int64_t{1} << 24) / V + 1;
  int bits = 0;
  while (bits < 7 && int64_t{2} << bits <= most) bits++;
  return bits;
}

// One row to draw from.
struct Row {
  const float* logits;
  int64_t V;
  float top, temperature, floor;
  int64_t top_k;
  float top_p;

  bool has_top_k() const { return top_k > 0 && top_k < V; }
  bool has_top_p() const { return top_p < 1; }
};

struct Token {
  float logit;
  int32_t weight;
};

// Memory that a thread keeps for the next row.
struct Scratch {
  std::vector<int32_t> weights;  // of tokens; exponentials before
  std::vector<int32_t> sums;     // of blocks of weights
  std::vector<float> tops;       // of blocks: the largest logit
  std::vector<float> some_tops;
  std::vector<Token> tokens;  // that filters look at

  // Finds the tokens whose logits are at least `low` and below `high`.
  void find(const Row& row, float low, float high) {
    tokens.clear();
    for (size_t block = 0; block < tops.size(); block++) {
      if (tops[block] < low) continue;
      const int64_t first = static_cast<int64_t>(block) * kVocabBlock, end = std::min(first + kVocabBlock, row.V);
      for (int64_t v = first; v < end; v++) {
        if (row.logits[v] >= low && row.logits[v] < high) tokens.push_back({row.logits[v], weights[v]});
      }
    }
  }
};

// Leaves the tokens at or above the k-th largest logit, or all at or above the floor where these are fewer.
void keep_top_k(const Row& row, Scratch& memory) {
  std::vector<float>& tops = memory.some_tops;
  tops = memory.tops;
  float bound = row.floor;
  if (row.top_k <= static_cast<int64_t>(tops.size())) {  // so many blocks have a token at or above the k-th block's top
    std::nth_element(tops.begin(), tops.begin() + (row.top_k - 1), tops.end(), std::greater<float>());
    bound = std::max(bound, tops[row.top_k - 1]);
  }
  memory.find(row, bound, kInfinity);
  std::vector<Token>& tokens = memory.tokens;
  if (static_cast<int64_t>(tokens.size()) <= row.top_k) return;
  const auto last = tokens.begin() + (row.top_k - 1);
  std::nth_element(tokens.begin(), last, tokens.end(),
                   [](const Token& a, const Token& b) { return a.logit > b.logit; });
  const float cut = last->logit;
  const auto is_below = [&](const Token& token) { return token.logit < cut; };
  tokens.erase(std::remove_if(last + 1, tokens.end(), is_below), tokens.end());
}

// Leaves tokens among which top-p cuts, and takes the weight of those above them from `need`. Bounds first double their
// distance from the top and then halve what lies between two of them: few tokens are looked at one by one.
void bracket_top_p(const SamplingKernels& kernels, const Row& row, int64_t& need, Scratch& memory) {
  constexpr float kFarthest = 32;  // e^-32 of the likeliest is no weight
  constexpr int kHalvings = 6;
  float low = row.floor, high = kInfinity, near = 0, far = 1;
  int64_t above = 0;
  const auto is_enough = [&](float distance) {
    const float bound = row.top - distance * row.temperature;
    const int64_t weight = kernels.weight_from(row.logits, row.V, memory.weights.data(), memory.tops.data(), bound);
    if (weight >= need) {
      low = std::max(bound, row.floor);
      return true;
    }
    high = bound;
    above = weight;
    return false;
  };
  while (far <= kFarthest && !is_enough(far)) {
    near = far;
    far *= 2;
  }
  for (int i = 0; i < kHalvings && far <= kFarthest; i++) {
    const float middle = 0.5f * (near + far);
    (is_enough(middle) ? far : near) = middle;
  }
  memory.find(row, low, high);
  need -= above;
}

// The largest logit at or above which `need` of the tokens' weight lies, or their least. Each turn halves the tokens that
// are looked at, about, by the logit of one of them.
float cut_by_weight(std::vector<Token>& tokens, int64_t need) {
  auto first = tokens.begin(), end = tokens.end();
  while (true) {
    const float pivot = (first + (end - first) / 2)->logit;
    const auto equal = std::partition(first, end, [&](const Token& token) { return token.logit > pivot; });
    const auto below = std::partition(equal, end, [&](const Token& token) { return token.logit == pivot; });
    const auto add = [](int64_t sum, const Token& token) { return sum + token.weight; };
    const int64_t above = std::accumulate(first, equal, int64_t{0}, add), with = std::accumulate(equal, below, above, add);
    if (above >= need) {
      end = equal;
    } else if (with >= need || below == end) {
      return pivot;
    } else {
      need -= with;
      first = below;
    }
  }
}

// The least logit that top-k, and of its weight top-p, keep, of all tokens' `mass`.
float find_cut(const SamplingKernels& kernels, const Row& row, int64_t mass, Scratch& memory) {
  std::vector<Token>& tokens = memory.tokens;
  if (row.has_top_k()) {
    keep_top_k(row, memory);
    if (tokens.empty()) return row.floor;
    if (!row.has_top_p()) {
      const auto is_less = [](const Token& a, const Token& b) { return a.logit < b.logit; };
      return std::min_element(tokens.begin(), tokens.end(), is_less)->logit;
    }
    mass = 0;
    for (const Token& token : tokens) mass += token.weight;
  }
  auto need = static_cast<int64_t>(std::max(std::ceil(static_cast<float>(mass) * row.top_p), 1.0f));
  if (!row.has_top_k()) bracket_top_p(kernels, row, need, memory);
  return tokens.empty() ? row.floor : cut_by_weight(tokens, need);
}

int32_t draw_token(const SamplingKernels& kernels, const Row& row, uint32_t bits, Scratch& memory) {
  const int64_t blocks = (row.V + kVocabBlock - 1) / kVocabBlock;
  memory.weights.resize(blocks * kVocabBlock);
  memory.sums.resize(blocks);
  memory.tops.resize(blocks);
  int32_t *weights = memory.weights.data(), *sums = memory.sums.data();
  auto* exponentials = reinterpret_cast<float*>(weights);  // kernels read and write either as bytes
  const int64_t norm = kernels.exponentials(row.logits, row.V, row.top, row.temperature, exponentials);
  const float scale = std::ldexp(1.0f, 23 + low_bits(row.V) + kNormBits) / static_cast<float>(norm);
  kernels.weigh(row.logits, row.V, row.floor, scale, exponentials, sums, memory.tops.data());
  const auto total = [&] { return std::accumulate(sums, sums + blocks, int64_t{0}); };
  if (row.has_top_k() || row.has_top_p()) {
    kernels.keep(row.logits, row.V, find_cut(kernels, row, total(), memory), weights, sums);
  }
  auto at = static_cast<int64_t>(bits * static_cast<uint64_t>(total()) >> 32);
  int64_t block = 0;
  while (block + 1 < blocks && at >= sums[block]) at -= sums[block++];
  int64_t v = block * kVocabBlock;
  while (v + 1 < row.V && at >= weights[v]) at -= weights[v++];
  return static_cast<int32_t>(v);
}

}  // namespace

void draw_tokens(const DrawRows& rows, int64_t count, int64_t V, int32_t* tokens) {
  const SamplingKernels& kernels = sampling_kernels();
  Pool::shared().for_each(count, [&](int64_t i) {
    static thread_local Scratch memory;
    const Row row{rows.logits + i * V, V, rows.top[i], rows.temperature[i], rows.floor[i], rows.top_k[i], rows.top_p[i]};
    tokens[i] = rows.active[i] ? draw_token(kernels, row, rows.bits[i], memory) : 0;
  });
}

void survey_rows(const SurveyRows& rows, int64_t count, int64_t V, float* norms, int32_t* ranks) {
  const SamplingKernels& kernels = sampling_kernels();
  Pool::shared().for_each(count, [&](int64_t i) {
    norms[i] = 0;
    ranks[i] = 0;
    const int64_t token = rows.token[i];
    if (!rows.active[i] || token < 0 || token >= V) return;
    const float* logits = rows.logits + i * V;
    int64_t before = 0;
    const double sum = kernels.survey(logits, V, rows.top[i], logits[token], token, &before);
    norms[i] = static_cast<float>(rows.top[i] + std::log(sum));
    ranks[i] = static_cast<int32_t>(before + 1);
  });
}

}  // namespace atoma
