// Cuts a step's attention into pieces and runs them on the pool. The kernels are `attention_*.cc`'s.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "paged_attention.h"
#include "pool.h"
#include "variant.h"

namespace atoma {

namespace {

// What a thread does alone in about the time that it takes to wake another: products of attention, floats written.
constexpr int64_t kAlone = 1 << 16;
constexpr int kTokensAtOnce = 8;  // that one piece writes

// The calling thread's, grown as needed.
float* scratch_memory(int64_t floats) {
  static thread_local std::vector<float> memory;
  constexpr int64_t kLine = 16;  // floats of a cache line
  if (static_cast<int64_t>(memory.size()) < floats + kLine) memory.resize(floats + kLine);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (-address % 64) / sizeof(float);
}

// A row that decodes, and one kv head: its spans' partial results, and how many of them are still to come.
struct Join {
  int row, kv_head, spans;
  int64_t partials;  // where they begin
};

struct Plan {
  std::vector<PrefillPiece> prefill;
  std::vector<DecodePiece> decode;
  std::vector<int> join_of;  // each decode piece
  std::vector<Join> joins;
  std::vector<float> partials;
  std::vector<std::atomic<int>> missing;  // spans of each join
  int64_t floats = 0;                     // of partial results
  int64_t products = 0;

  void clear() {
    prefill.clear();
    decode.clear();
    join_of.clear();
    joins.clear();
    floats = products = 0;
  }
};

void plan_decode(const AttentionProblem& p, Plan& plan) {
  const int64_t of_piece = static_cast<int64_t>(p.N / p.K) * (p.H + 2);
  for (int row = 0; row < p.B; row++) {
    const int length = p.decode_lengths[row];
    if (length == 0) continue;
    const int first = std::max(length - p.window, 0), first_span = first / kSpan;
    const int spans = (length - 1) / kSpan - first_span + 1;
    plan.products += static_cast<int64_t>(length - first) * p.N * p.H * 2;
    for (int kv_head = 0; kv_head < p.K; kv_head++) {
      plan.joins.push_back({row, kv_head, spans, plan.floats});
      for (int span = first_span; span < first_span + spans; span++) {
        const int from = std::max(first, span * kSpan), to = std::min(length, (span + 1) * kSpan);
        plan.decode.push_back({row, kv_head, from, to, nullptr});
        plan.join_of.push_back(static_cast<int>(plan.joins.size()) - 1);
        plan.floats += of_piece;
      }
    }
  }
}

void plan_prefill(const AttentionProblem& p, Plan& plan) {
  const int G = p.N / p.K;
  for (int block = 0; block < p.blocks; block++) {
    const int queries = p.block_size[block] * G;
    plan.products += static_cast<int64_t>(p.block_size[block]) * (p.block_position[block] + 1) * p.N * p.H * 2;
    for (int kv_head = 0; kv_head < p.K; kv_head++)
      for (int first = 0; first < queries; first += kTile)
        plan.prefill.push_back({block, kv_head, first, std::min(queries, first + kTile)});
  }
  std::reverse(plan.prefill.begin(), plan.prefill.end());  // the longest contexts first
}

void zero_unclaimed(const AttentionProblem& p) {
  static thread_local std::vector<char> claimed;
  claimed.assign(p.T, 0);
  for (int row = 0; row < p.B; row++)
    if (p.decode_lengths[row] > 0) claimed[row] = 1;
  for (int block = 0; block < p.blocks; block++)
    std::fill_n(claimed.begin() + p.block_token[block], p.block_size[block], 1);
  const int64_t of_token = static_cast<int64_t>(p.N) * p.H;
  for (int token = 0; token < p.T; token++)
    if (!claimed[token]) std::memset(p.out + token * of_token, 0, of_token * sizeof(float));
}

void write_tokens(const AttentionProblem& p, const AttentionKernels& kernels, Pool& pool) {
  const bool alone = static_cast<int64_t>(p.T) * p.K * p.H * 2 < kAlone;
  const int at_once = alone ? p.T : kTokensAtOnce;
  pool.for_each((p.T + at_once - 1) / at_once, [&](int64_t piece) {
    const int first = static_cast<int>(piece) * at_once;
    for (int token = first; token < std::min(p.T, first + at_once); token++) kernels.write_token(p, token);
  });
}

}  // namespace

AttentionKernels active_attention(KvFormat format) {
#if defined(__x86_64__)
  if (active_variant() >= Variant::kAvx512Vnni) return avx512_attention(format);
  if (active_variant() == Variant::kAvx2) return avx2_attention(format);
#endif
  return portable_attention(format);
}

void attend(const AttentionProblem& p, const AttentionKernels& kernels, Pool& pool) {
  zero_unclaimed(p);
  write_tokens(p, kernels, pool);
  // The caller's memory from call to call: a step asks for as much again in every layer.
  static thread_local Plan memory;
  Plan& plan = memory;  // for the other threads of the pool, which have a `memory` of their own
  plan.clear();
  plan_decode(p, plan);
  plan_prefill(p, plan);
  if (static_cast<int64_t>(plan.partials.size()) < plan.floats) plan.partials.resize(plan.floats);
  if (plan.missing.size() < plan.joins.size()) plan.missing = std::vector<std::atomic<int>>(plan.joins.size());
  const int64_t of_piece = static_cast<int64_t>(p.N / p.K) * (p.H + 2);
  for (size_t i = 0; i < plan.joins.size(); i++) plan.missing[i].store(plan.joins[i].spans, std::memory_order_relaxed);
  for (size_t i = 0; i < plan.decode.size(); i++) plan.decode[i].partial = plan.partials.data() + i * of_piece;

  const int64_t num_prefill = static_cast<int64_t>(plan.prefill.size());
  const int64_t pieces = num_prefill + static_cast<int64_t>(plan.decode.size());
  const int64_t floats = scratch_floats(p);
  auto run_piece = [&](int64_t i) {
    float* scratch = scratch_memory(floats);
    if (i < num_prefill) return kernels.prefill(p, plan.prefill[i], scratch);
    const int64_t at = i - num_prefill;
    kernels.decode(p, plan.decode[at], scratch);
    const int which = plan.join_of[at];
    if (plan.missing[which].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    const Join& join = plan.joins[which];  // this was the last of its spans
    kernels.join(p, join.row, join.kv_head, join.spans, plan.partials.data() + join.partials);
  };
  if (plan.products < kAlone)
    pool.for_each(1, [&](int64_t) {
      for (int64_t i = 0; i < pieces; i++) run_piece(i);
    });
  else
    pool.for_each(pieces, run_piece);
}

}  // namespace atoma
