// What a step asks of rows of logits beside their largest: a random token, or the sum of all and a token's rank.
//
// A draw is the one that atoma_jax/engine/draw.py describes: probabilities become whole numbers, so that sums do not
// depend on how they are made; what top-k, top-p and min-p keep is what a sorted row would keep, with every token that
// ties with the last of them; one number of 32 bits picks a place in the sum. A row's result depends on that row alone.
#pragma once

#include <cstdint>

namespace atoma {

inline constexpr int kNormBits = 17;  // of an exponential's fraction in its row's sum: a block's fits an int32

inline constexpr int64_t kVocabBlock = 128;  // tokens whose weights are summed apart: V is filled up to whole blocks

// Rows to draw from: of each, V logits and its settings.
struct DrawRows {
  const float* logits;       // [rows, V], without NaN in rows that are active
  const float* top;          // the largest of them, finite
  const float* temperature;  // above 0
  const float* floor;        // logits below it are not kept: min-p's, at most `top`
  const int32_t* top_k;      // 0: without
  const float* top_p;        // 1: without
  const uint32_t* bits;      // random
  const bool* active;
};

// Rows of which the sum and a token's rank are asked for.
struct SurveyRows {
  const float* logits;  // [rows, V]
  const float* top;     // the largest of each row
  const int32_t* token;
  const bool* active;
};

// One variant's functions, over whole blocks of a row.
struct SamplingKernels {
  // out[blocks · 128] = e^((logit - top) / temperature), zeros behind V. The sum of ⌈out · 2^17⌉.
  int64_t (*exponentials)(const float* logits, int64_t V, float top, float temperature, float* out);

  // out = round(exponential · scale), half to even, where the logit is at least `floor`, in the same memory; of each
  // block their sum, and the largest logit.
  void (*weigh)(const float* logits, int64_t V, float floor, float scale, float* exponentials, int32_t* sums,
                float* tops);

  // Zeros for the weights of tokens whose logit is below `cut`, and the sums again.
  void (*keep)(const float* logits, int64_t V, float cut, int32_t* weights, int32_t* sums);

  // The weight of tokens whose logit is at least `bound`, which is looked for in blocks whose top is.
  int64_t (*weight_from)(const float* logits, int64_t V, const int32_t* weights, const float* tops, float bound);

  // The sum of e^(logit - top), and how many tokens come before `token`, whose logit is `own`.
  double (*survey)(const float* logits, int64_t V, float top, float own, int64_t token, int64_t* before);
};

// A token of each row, on all threads; 0 in rows that are not active.
void draw_tokens(const DrawRows& rows, int64_t count, int64_t V, int32_t* tokens);

// Of each row log Σ e^logit, and the rank of its token: 1 for the likeliest; of equal tokens the lower id comes first.
// Zeros in rows that are not active, and for tokens outside of [0, V).
void survey_rows(const SurveyRows& rows, int64_t count, int64_t V, float* norms, int32_t* ranks);

}  // namespace atoma
