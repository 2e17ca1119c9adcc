// The product with dense weights with AVX-512.
#include "dense_kernel.h"

namespace atoma {

extern const DenseProduct kDenseAvx512;
const DenseProduct kDenseAvx512 = dense_product<Avx512Vectors>;

}  // namespace atoma
