// Norms and activations with AVX2, FMA and F16C.
#include "rowwise_kernel.h"

namespace atoma {

extern const RowwiseKernels kRowwiseAvx2;
const RowwiseKernels kRowwiseAvx2 = rowwise_kernels_of<Avx2Vectors>();

}  // namespace atoma
