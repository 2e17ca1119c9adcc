// Draws from rows of logits with AVX-512.
#include "sampling_kernel.h"

namespace atoma {

extern const SamplingKernels kSamplingAvx512;
const SamplingKernels kSamplingAvx512 = sampling_kernels_of<Avx512Vectors>();

}  // namespace atoma
