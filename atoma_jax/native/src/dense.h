// x · Wᵀ for a weight [N, K] of plain floats as they are stored, K of a row together. Numbers of 16 bits are widened as
// they are read, which is exact; sums are float32.
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

// One variant's function: y[rows][N], columns first … first + columns - 1.
using DenseProduct = void (*)(const DenseWeight& weight, int64_t first, int64_t columns, const float* x, int64_t rows,
                              float* y);

// y [rows, N] = x [rows, K] · Wᵀ. The last rows of x, as far as they are zeros, cost nothing and give zeros.
void dense_matmul(const DenseWeight& weight, const float* x, int64_t rows, float* y);

}  // namespace atoma
