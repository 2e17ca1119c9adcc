// The product with dense weights in plain C++.
#include "dense_kernel.h"

namespace atoma {

extern const DenseKernels kDensePortable;
const DenseKernels kDensePortable{dense_product<PortableVectors>, nullptr, nullptr};

}  // namespace atoma
