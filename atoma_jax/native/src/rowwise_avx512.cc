// Norms and activations with AVX-512.
#include "rowwise_kernel.h"

namespace atoma {

extern const RowwiseKernels kRowwiseAvx512;
const RowwiseKernels kRowwiseAvx512 = rowwise_kernels_of<Avx512Vectors>();

}  // namespace atoma
