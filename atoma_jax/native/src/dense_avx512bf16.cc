// The product with dense weights with AVX-512 and its instructions for bfloat16.
#include "bfloat_vectors.h"
#include "dense_kernel.h"

namespace atoma {
namespace {

void rounded_product(const DenseWeight& weight, int64_t first, int64_t columns, const uint16_t* x, int64_t rows,
                     float* y) {
  const auto* numbers = reinterpret_cast<const BFloat16*>(x);
  stored_product<Avx512BfloatVectors, BFloat16>(weight, first, columns, numbers, rows, y);
}

}  // namespace

extern const DenseKernels kDenseAvx512Bf16;
const DenseKernels kDenseAvx512Bf16{dense_product<Avx512Vectors>, rounded_product, round_to_bfloat};

}  // namespace atoma
