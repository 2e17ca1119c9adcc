// Norms and activations in plain C++.
#include "rowwise_kernel.h"

namespace atoma {

extern const RowwiseKernels kRowwisePortable;
const RowwiseKernels kRowwisePortable = rowwise_kernels_of<PortableVectors>();

}  // namespace atoma
