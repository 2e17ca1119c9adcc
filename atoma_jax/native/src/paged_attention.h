// Attention of one layer over a paged KV cache: the problem, and what the kernels of an instruction set do of it.
//
// A step's tokens are first written to their pages, then every query attends to its sequence's context.
// The work is cut into pieces that threads take one by one. How it is cut, and the order in which a piece adds, depend
// on the sequence alone: its results are the same bits whatever else the step holds and however many threads there are.
#pragma once

#include <cstdint>

namespace atoma {

class Pool;

// Formats of `pallas_kernels/kv_pages.py`.
enum class KvFormat { kFloat32, kBFloat16, kHalf, kFloat8, kInt8 };

// Decode cuts a context into spans of so many tokens, at multiples of it.
constexpr int kSpan = 256;
// Prefill handles so many queries at once: tokens times query heads of one kv head.
constexpr int kTile = 48;
// Prefill reads so many tokens of context at once.
constexpr int kChunk = 64;

// T tokens, B sequences, N query heads, K kv heads, H head dim, P pages of S slots, page tables of W pages.
struct AttentionProblem {
  int T, B, N, K, H, P, S, W;
  const float* q;  // [T, N, H]
  const float* k;  // [T, K, H]
  const float* v;  // [T, K, H]
  KvFormat format;
  void* k_pages;   // [P, K, S, H], of the layer
  void* v_pages;   // likewise
  float* k_scale;  // [P, K, S], of the layer; null where the format has none
  float* v_scale;
  const int32_t* page;            // [T] that a token's K and V go to; page 0 is scratch
  const int32_t* slot;            // [T] inside that page
  const int32_t* page_table;      // [B, W]
  const int32_t* decode_lengths;  // [B] context of a row that decodes; 0: it does not
  // Runs of queries of one sequence each, `blocks` of them; none in a step that only decodes.
  int blocks;
  const int32_t* block_row;
  const int32_t* block_token;     // first token in the batch
  const int32_t* block_size;      // tokens
  const int32_t* block_position;  // of the first token in its sequence
  int window;                     // how many positions back a query sees, itself included
  float scale;                    // of the logits
  float softcap;                  // 0: none
  float* out;                     // [T, N, H]
};

// Tokens first … end - 1 of the context of a row that decodes, for the query heads of one kv head.
struct DecodePiece {
  int row, kv_head, first, end;
  float* partial;  // [G, H + 2]: weighted sum of V, largest logit, sum of weights of each query head
};

// Queries first … end - 1 of a run: numbered token by token, and in a token by the query heads of one kv head.
struct PrefillPiece {
  int block, kv_head, first, end;
};

// What one instruction set's translation unit offers. Scratch memory is the calling thread's.
struct AttentionKernels {
  void (*write_token)(const AttentionProblem&, int token);
  void (*decode)(const AttentionProblem&, const DecodePiece&, float* scratch);
  // Joins the partial results of a row's spans, which lie one behind the other.
  void (*join)(const AttentionProblem&, int row, int kv_head, int spans, const float* partials);
  void (*prefill)(const AttentionProblem&, const PrefillPiece&, float* scratch);
};

// Writes the step's K and V, then attends. Indices must have been checked. Results for tokens that no row claims are 0.
void attend(const AttentionProblem&, const AttentionKernels&, Pool&);

// The kernels of the variant that runs.
AttentionKernels active_attention(KvFormat);

// One translation unit each.
AttentionKernels portable_attention(KvFormat);
AttentionKernels avx2_attention(KvFormat);
AttentionKernels avx512_attention(KvFormat);

// Floats of scratch memory that a thread needs.
inline int64_t scratch_floats(const AttentionProblem& p) {
  const int64_t G = p.N / p.K, padded = p.H + 16;
  const int64_t decode = G * (padded + kSpan + 16);
  const int64_t prefill = kTile * (2 * padded + kChunk + 8) + 2 * kChunk * padded;
  return (decode > prefill ? decode : prefill) + 64;
}

}  // namespace atoma
