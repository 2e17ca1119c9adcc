// The product of dense.h over all columns: pieces for the pool.
#include "dense.h"

#include <algorithm>

#include "matmul.h"
#include "pool.h"
#include "product_pieces.h"
#include "variant.h"

namespace atoma {

extern const DenseProduct kDensePortable;
#if defined(__x86_64__)
extern const DenseProduct kDenseAvx2, kDenseAvx512;
#endif

namespace {

DenseProduct active_product() {
#if defined(__x86_64__)
  if (active_variant() == Variant::kAvx512Vnni) return kDenseAvx512;
  if (active_variant() == Variant::kAvx2) return kDenseAvx2;
#endif
  return kDensePortable;
}

}  // namespace

void dense_matmul(const DenseWeight& weight, const float* x, int64_t all_rows, float* y) {
  const int64_t N = weight.N, K = weight.K, rows = rows_in_use(x, all_rows, K);
  std::fill_n(y + rows * N, (all_rows - rows) * N, 0.0f);
  if (rows == 0) return;
  const DenseProduct product = active_product();
  const int64_t tiles = (N + kDenseColumns - 1) / kDenseColumns;
  for_each_tile(Pool::shared(), rows, tiles, [&](int64_t first_row, int64_t count, int64_t tile) {
    const int64_t first = tile * kDenseColumns, columns = std::min(kDenseColumns, N - first);
    product(weight, first, columns, x + first_row * K, count, y + first_row * N);
  });
}

}  // namespace atoma
