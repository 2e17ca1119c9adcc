// The functions of matmul.h, compiled for this variant.
#include "isa_portable.h"
#include "matmul_kernel.h"

namespace atoma {

extern const MatmulKernels kMatmulPortable;
const MatmulKernels kMatmulPortable = matmul_kernels_of<Portable>();

}  // namespace atoma
