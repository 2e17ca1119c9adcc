// The functions of rowwise.h over all rows: which of them have something, and pieces for the pool.
#include "rowwise.h"

#include <algorithm>

#include "matmul.h"
#include "pool.h"
#include "product_pieces.h"
#include "variant.h"

namespace atoma {

extern const RowwiseKernels kRowwisePortable;
#if defined(__x86_64__)
extern const RowwiseKernels kRowwiseAvx2, kRowwiseAvx512;
#endif

const RowwiseKernels& rowwise_kernels() {
#if defined(__x86_64__)
  if (active_variant() >= Variant::kAvx512Vnni) return kRowwiseAvx512;
  if (active_variant() == Variant::kAvx2) return kRowwiseAvx2;
#endif
  return kRowwisePortable;
}

void rms_norm(const float* x, const float* scale, int64_t all_rows, int64_t D, float eps, float* out) {
  const RowwiseKernels& kernels = rowwise_kernels();
  const int64_t rows = rows_in_use(x, all_rows, D);
  std::fill_n(out + rows * D, (all_rows - rows) * D, 0.0f);
  for_each_row(Pool::shared(), rows, D, [&](int64_t row) { kernels.rms_norm(x + row * D, scale, D, eps, out + row * D); });
}

void rotate_heads(const Heads& heads, const float* qkv, const float* cos, const float* sin, int64_t tokens, float* q,
                  float* k, float* v) {
  const RowwiseKernels& kernels = rowwise_kernels();
  const int64_t of_q = heads.K * heads.G * heads.H, of_k = heads.K * heads.H, width = of_q + 2 * of_k;
  const int64_t rows = rows_in_use(qkv, tokens, width);
  std::fill_n(q + rows * of_q, (tokens - rows) * of_q, 0.0f);
  std::fill_n(k + rows * of_k, (tokens - rows) * of_k, 0.0f);
  std::fill_n(v + rows * of_k, (tokens - rows) * of_k, 0.0f);
  for_each_row(Pool::shared(), rows, width, [&](int64_t row) {
    kernels.rotate_heads(heads, qkv + row * width, cos + row * heads.half, sin + row * heads.half, q + row * of_q,
                         k + row * of_k, v + row * of_k);
  });
}

void gated(const float* gate_up, int64_t all_rows, int64_t F, Gate kind, float* out) {
  const RowwiseKernels& kernels = rowwise_kernels();
  const int64_t rows = rows_in_use(gate_up, all_rows, 2 * F);
  std::fill_n(out + rows * F, (all_rows - rows) * F, 0.0f);
  for_each_row(Pool::shared(), rows, 2 * F, [&](int64_t row) {
    const float* gate = gate_up + row * 2 * F;
    kernels.gated(gate, gate + F, F, kind, out + row * F);
  });
}

}  // namespace atoma
