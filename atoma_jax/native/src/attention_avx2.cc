// The attention kernels with AVX2, FMA and F16C.
#include "attention_variant.h"

namespace atoma {

AttentionKernels avx2_attention(KvFormat format) { return attention_kernels<Avx2Vectors>(format); }

}  // namespace atoma
