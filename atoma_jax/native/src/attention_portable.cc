// The attention kernels in C++ alone.
#include "attention_variant.h"

namespace atoma {

AttentionKernels portable_attention(KvFormat format) { return attention_kernels<PortableVectors>(format); }

}  // namespace atoma
