// Draws from rows of logits in plain C++.
#include "sampling_kernel.h"

namespace atoma {

extern const SamplingKernels kSamplingPortable;
const SamplingKernels kSamplingPortable = sampling_kernels_of<PortableVectors>();

}  // namespace atoma
