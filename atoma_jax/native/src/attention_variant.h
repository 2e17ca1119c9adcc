// The table of one instruction set's attention kernels, for each format of the cache.
#pragma once

#include "attention_decode.h"
#include "attention_prefill.h"
#include "kv_rows.h"
#include "paged_attention.h"

namespace atoma {
namespace {

template <class Isa, class Stored>
constexpr AttentionKernels kAttentionKernels{write_token<Isa, Stored>, decode<Isa, Stored>, join,
                                             prefill<Isa, Stored>};

template <class Isa>
AttentionKernels attention_kernels(KvFormat format) {
  switch (format) {
    case KvFormat::kFloat32:
      return kAttentionKernels<Isa, float>;
    case KvFormat::kBFloat16:
      return kAttentionKernels<Isa, BFloat16>;
    case KvFormat::kHalf:
      return kAttentionKernels<Isa, Half>;
    case KvFormat::kFloat8:
      return kAttentionKernels<Isa, Float8>;
    case KvFormat::kInt8:
      return kAttentionKernels<Isa, int8_t>;
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace atoma
