// Which of the compiled variants of every kernel runs: chosen once from what the CPU and the operating system can do.
//
// A kernel family FAMILY has one source a variant, FAMILY_VARIANT.cc, compiled with that variant's instructions
// (atoma_jax/native/build.py), and a table of functions for each. Each variant can what those before it can: a family
// that has no use for its instructions runs the one before. Owns the choice; knows no kernel.
#pragma once

namespace atoma {

enum class Variant : int { kPortable = 0, kAvx2 = 1, kAvx512Vnni = 2, kAvx512Bf16 = 3 };
inline constexpr int kNumVariants = 4;

// Whether this CPU runs it, and this library was compiled with it (x86-64 alone has more than the portable one).
bool is_supported(Variant variant);

// The one that kernels run: the best that is supported, or what `force_variant` said.
Variant active_variant();

// For tests, which run all of them. The variant must be supported. Calls that are running keep theirs.
void force_variant(Variant variant);

}  // namespace atoma
