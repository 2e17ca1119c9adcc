// The choice of variant.h.
#include "variant.h"

#include <atomic>

namespace atoma {

bool is_supported(Variant variant) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks XGETBV whether the operating system saves the wide registers.
  switch (variant) {
    case Variant::kPortable:
      return true;
    case Variant::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Variant::kAvx512Vnni:
      return is_supported(Variant::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case Variant::kAvx512Bf16:
      return is_supported(Variant::kAvx512Vnni) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return variant == Variant::kPortable;
#endif
}

namespace {

Variant best_variant() {
  for (int i = kNumVariants - 1; i > 0; i--) {
    if (is_supported(static_cast<Variant>(i))) return static_cast<Variant>(i);
  }
  return Variant::kPortable;
}

std::atomic<Variant>& chosen() {
  static std::atomic<Variant> variant{best_variant()};
  return variant;
}

}  // namespace

Variant active_variant() { return chosen().load(std::memory_order_relaxed); }

void force_variant(Variant variant) { chosen().store(variant, std::memory_order_relaxed); }

}  // namespace atoma
