// The product of dense.h over all columns: pieces for the pool.
#include "dense.h"

#include <algorithm>
#include <vector>

#include "matmul.h"
#include "pool.h"
#include "product_pieces.h"
#include "variant.h"

namespace atoma {

extern const DenseKernels kDensePortable;
#if defined(__x86_64__)
extern const DenseKernels kDenseAvx2, kDenseAvx512, kDenseAvx512Bf16;
#endif

namespace {

const DenseKernels& dense_kernels() {  // of the active variant
  switch (active_variant()) {
#if defined(__x86_64__)
    case Variant::kAvx512Bf16:
      return kDenseAvx512Bf16;
    case Variant::kAvx512Vnni:
      return kDenseAvx512;
    case Variant::kAvx2:
      return kDenseAvx2;
#endif
    default:
      return kDensePortable;
  }
}

}  // namespace

void dense_matmul(const DenseWeight& weight, const float* x, int64_t all_rows, bool may_round, float* y) {
  const int64_t N = weight.N, K = weight.K, rows = rows_in_use(x, all_rows, K);
  std::fill_n(y + rows * N, (all_rows - rows) * N, 0.0f);
  if (rows == 0) return;
  const DenseKernels& kernels = dense_kernels();
  const bool rounds = may_round && weight.type == DenseType::kBfloat16 && kernels.rounded_product != nullptr;
  static thread_local std::vector<uint16_t> memory;  // kept for the next call
  if (rounds) memory.resize(std::max<size_t>(memory.size(), rows * K));
  uint16_t* rounded = memory.data();  // of this thread, which is not the one that rounds or multiplies
  Pool& pool = Pool::shared();
  if (rounds) for_each_row(pool, rows, K, [&](int64_t row) { kernels.round(x + row * K, K, rounded + row * K); });
  const int64_t tiles = (N + kDenseColumns - 1) / kDenseColumns;
  for_each_tile(pool, rows, tiles, [&](int64_t first_row, int64_t count, int64_t tile) {
    const int64_t first = tile * kDenseColumns, columns = std::min(kDenseColumns, N - first);
    float* to = y + first_row * N;
    if (rounds) {
      kernels.rounded_product(weight, first, columns, rounded + first_row * K, count, to);
    } else {
      kernels.product(weight, first, columns, x + first_row * K, count, to);
    }
  });
}

}  // namespace atoma
