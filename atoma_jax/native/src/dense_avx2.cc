// The product with dense weights with AVX2, FMA and F16C.
#include "dense_kernel.h"

namespace atoma {

extern const DenseProduct kDenseAvx2;
const DenseProduct kDenseAvx2 = dense_product<Avx2Vectors>;

}  // namespace atoma
