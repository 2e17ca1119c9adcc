// The product with dense weights with AVX-512.
#include "dense_kernel.h"

namespace atoma {

extern const DenseKernels kDenseAvx512;
const DenseKernels kDenseAvx512{dense_product<Avx512Vectors>, nullptr, nullptr};

}  // namespace atoma
