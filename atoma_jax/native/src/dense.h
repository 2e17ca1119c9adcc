// x · Wᵀ for a weight [N, K] of plain floats as they are stored, K of a row together. Sums are float32. Numbers of 16 bits
// are widened as they are read, which is exact; where the processor multiplies bfloat16 and x may be rounded to it,
// weights in bfloat16 are multiplied as they are.
//
// A row of the product depends on that row of x alone, bit for bit.
#pragma once

#include <cstdint>

namespace atoma {

enum class DenseType : int { kFloat32, kBfloat16, kFloat16 };

struct DenseWeight {
  const void* values = nullptr;
  DenseType type = DenseType::kFloat32;
  int64_t N = 0;
  int64_t K = 0;
};

// Columns of y that are made together.
inline constexpr int64_t kDenseColumns = 16;

// One variant's functions. Products are y[rows][N], columns first … first + columns - 1.
struct DenseKernels {
  void (*product)(const DenseWeight& weight, int64_t first, int64_t columns, const float* x, int64_t rows, float* y);

  // Of weights in bfloat16 with x as `round` makes it. Null, both, where no instruction multiplies them.
  void (*rounded_product)(const DenseWeight& weight, int64_t first, int64_t columns, const uint16_t* x, int64_t rows,
                          float* y);
  // Rounds to bfloat16, half to even.
  void (*round)(const float* x, int64_t count, uint16_t* out);
};

// y [rows, N] = x [rows, K] · Wᵀ. The last rows of x, as far as they are zeros, cost nothing and give zeros. `may_round`:
// x may be rounded to the type of W.
void dense_matmul(const DenseWeight& weight, const float* x, int64_t rows, bool may_round, float* y);

}  // namespace atoma
