// The product with dense weights with AVX2, FMA and F16C.
#include "dense_kernel.h"

namespace atoma {

extern const DenseKernels kDenseAvx2;
const DenseKernels kDenseAvx2{dense_product<Avx2Vectors>, nullptr, nullptr};

}  // namespace atoma
