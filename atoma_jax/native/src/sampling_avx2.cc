// Draws from rows of logits with AVX2, FMA and F16C.
#include "sampling_kernel.h"

namespace atoma {

extern const SamplingKernels kSamplingAvx2;
const SamplingKernels kSamplingAvx2 = sampling_kernels_of<Avx2Vectors>();

}  // namespace atoma
