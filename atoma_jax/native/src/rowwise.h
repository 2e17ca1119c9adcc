// What a layer does to each row of activations by itself: norms, rotated heads, and activations with gates.
//
// A row's result depends on that row alone. The last rows, as far as they are zeros, cost nothing and give zeros: a
// step has as many rows as its program, filled up with them.
#pragma once

#include <cstdint>

namespace atoma {

// What becomes of a gate before it is multiplied.
enum class Gate : int { kSilu = 0, kGeluTanh = 1, kReluSquared = 2 };

// How a projection's row becomes queries, keys and values: [K, G + 2, H], of each kv head its G queries, key and value.
struct Heads {
  int64_t K, G, H;
  int64_t half;          // the first so many numbers of a query and a key rotate against the next so many
  const float* q_scale;  // [H] of a norm before; null: there is none
  const float* k_scale;
  float eps;  // of the norms
};

// One variant's functions.
struct RowwiseKernels {
  // out = x · scale / √(mean of x² + eps), of D numbers.
  void (*rms_norm)(const float* x, const float* scale, int64_t D, float eps, float* out);

  // q [K · G, H], k [K, H] and v [K, H] of one token; cosines and sines are its own, [half].
  void (*rotate_heads)(const Heads& heads, const float* qkv, const float* cos, const float* sin, float* q, float* k,
                       float* v);

  // out = activation(gate) · up, of F numbers each.
  void (*gated)(const float* gate, const float* up, int64_t F, Gate kind, float* out);
};

const RowwiseKernels& rowwise_kernels();  // of the active variant

// Of each row of x [rows, D], on all threads.
void rms_norm(const float* x, const float* scale, int64_t rows, int64_t D, float eps, float* out);

// Of each row of qkv [tokens, K · (G + 2) · H], with the rows of cos and sin [tokens, half].
void rotate_heads(const Heads& heads, const float* qkv, const float* cos, const float* sin, int64_t tokens, float* q,
                  float* k, float* v);

// Of each row of gate_up [rows, 2F], gates first, to out [rows, F].
void gated(const float* gate_up, int64_t rows, int64_t F, Gate kind, float* out);

}  // namespace atoma
