// The attention kernels with AVX-512.
#include "attention_variant.h"

namespace atoma {

AttentionKernels avx512_attention(KvFormat format) { return attention_kernels<Avx512Vectors>(format); }

}  // namespace atoma
