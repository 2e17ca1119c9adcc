// The functions of matmul.h, compiled for this variant.
#include "isa_avx2.h"
#include "matmul_kernel.h"

namespace atoma {

extern const MatmulKernels kMatmulAvx2;
const MatmulKernels kMatmulAvx2 = matmul_kernels_of<Avx2>();

}  // namespace atoma
