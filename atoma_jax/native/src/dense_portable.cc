// The product with dense weights in plain C++.
#include "dense_kernel.h"

namespace atoma {

extern const DenseProduct kDensePortable;
const DenseProduct kDensePortable = dense_product<PortableVectors>;

}  // namespace atoma
