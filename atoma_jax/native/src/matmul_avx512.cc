// The functions of matmul.h, compiled for this variant.
#include "isa_avx512.h"
#include "matmul_kernel.h"

namespace atoma {

extern const MatmulKernels kMatmulAvx512;
const MatmulKernels kMatmulAvx512 = matmul_kernels_of<Avx512>();

}  // namespace atoma
