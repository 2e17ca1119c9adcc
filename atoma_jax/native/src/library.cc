// What Python asks of the library itself: what it is and runs with, packing, and `probe`, the smallest handler.
#include "ffi.h"
#include "pack.h"
#include "pool.h"
#include "variant.h"

#ifndef ATOMA_SOURCES
#error "build.py defines ATOMA_SOURCES: the digest of the sources that this library is made of"
#endif

#define ATOMA_TEXT_OF(x) #x
#define ATOMA_TEXT(x) ATOMA_TEXT_OF(x)

// Read from the file before anything in it runs.
ATOMA_EXPORT const char atoma_stamp[] =
    "atoma-native sources=" ATOMA_SOURCES " ffi=" ATOMA_TEXT(XLA_FFI_API_MAJOR) "." ATOMA_TEXT(XLA_FFI_API_MINOR);

ATOMA_EXPORT void atoma_set_threads(int threads) { atoma::set_pool_threads(threads); }

ATOMA_EXPORT int atoma_num_variants() { return atoma::kNumVariants; }
ATOMA_EXPORT int atoma_active_variant() { return static_cast<int>(atoma::active_variant()); }
ATOMA_EXPORT int atoma_is_supported(int variant) { return atoma::is_supported(static_cast<atoma::Variant>(variant)); }
ATOMA_EXPORT void atoma_force_variant(int variant) { atoma::force_variant(static_cast<atoma::Variant>(variant)); }

// int32 [2]: the variant and the number of threads that kernels run with.
static ffi::Error ProbeImpl(ffi::ResultBufferR1<ffi::S32> out) {
  if (out->element_count() != 2) return ffi::Error::InvalidArgument("probe: the result must be int32 [2]");
  out->typed_data()[0] = static_cast<int32_t>(atoma::active_variant());
  out->typed_data()[1] = atoma::Pool::shared().threads();
  return ffi::Error::Success();
}
ATOMA_HANDLER(probe, ProbeImpl, ffi::Ffi::Bind().Ret<ffi::BufferR1<ffi::S32>>());

// Called by Python itself, while it loads a model (native/tiles.py).
ATOMA_EXPORT void atoma_pack_codes(const uint8_t* codes, int64_t n, int64_t K, int64_t bits, const int64_t* to,
                                   int64_t blocks, uint8_t* out) {
  atoma::pack_codes(codes, n, K, static_cast<int>(bits), to, blocks, out);
}
ATOMA_EXPORT void atoma_pack_factors(const void* factors, int64_t n, int64_t groups, int64_t bytes, const int64_t* to,
                                     int64_t filled, void* out) {
  atoma::pack_factors(factors, n, groups, bytes, to, filled, out);
}
