// What a layer does to each row of activations by itself: norms, and activations with gates.
//
// A row's result depends on that row alone. The last rows, as far as they are zeros, cost nothing and give zeros: a
// step has as many rows as its program, filled up with them.
#pragma once

#include <cstdint>

namespace atoma {

// What becomes of a gate before it is multiplied.
enum class Gate : int { kSilu = 0, kGeluTanh = 1, kReluSquared = 2 };

// One variant's functions.
struct RowwiseKernels {
  // out = x · scale / √(mean of x² + eps), of D numbers.
  void (*rms_norm)(const float* x, const float* scale, int64_t D, float eps, float* out);

  // out = activation(gate) · up, of F numbers each.
  void (*gated)(const float* gate, const float* up, int64_t F, Gate kind, float* out);
};

// Of each row of x [rows, D], on all threads.
void rms_norm(const float* x, const float* scale, int64_t rows, int64_t D, float eps, float* out);

// Of each row of gate_up [rows, 2F], gates first, to out [rows, F].
void gated(const float* gate_up, int64_t rows, int64_t F, Gate kind, float* out);

}  // namespace atoma
