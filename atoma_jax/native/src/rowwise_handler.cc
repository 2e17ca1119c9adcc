// The XLA FFI handlers of norms and activations (rowwise.h): shapes checked.
#include <cstdint>
#include <string>

#include "ffi.h"
#include "rowwise.h"

namespace {

using Rows = ffi::BufferR2<ffi::F32>;

ffi::Error Wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("rows of activations: ") + what); }

ffi::Error RmsNormImpl(Rows x, ffi::BufferR1<ffi::F32> scale, ffi::Result<Rows> out, float eps) {
  const int64_t rows = x.dimensions()[0], D = x.dimensions()[1];
  if (scale.dimensions()[0] != D) return Wrong("the scale must be [D]");
  if (out->dimensions()[0] != rows || out->dimensions()[1] != D) return Wrong("the result must be [rows, D]");
  atoma::rms_norm(x.typed_data(), scale.typed_data(), rows, D, eps, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error GatedImpl(Rows gate_up, ffi::Result<Rows> out, int64_t activation) {
  const int64_t rows = gate_up.dimensions()[0], F = out->dimensions()[1];
  if (out->dimensions()[0] != rows || gate_up.dimensions()[1] != 2 * F) return Wrong("the result must be [rows, F] of 2F");
  if (activation < 0 || activation > 2) return Wrong("unknown activation");
  atoma::gated(gate_up.typed_data(), rows, F, static_cast<atoma::Gate>(activation), out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

ATOMA_HANDLER(rms_norm, RmsNormImpl,
              ffi::Ffi::Bind()
                  .Arg<Rows>()                     // x
                  .Arg<ffi::BufferR1<ffi::F32>>()  // scale
                  .Ret<Rows>()
                  .Attr<float>("eps"));
ATOMA_HANDLER(gated, GatedImpl, ffi::Ffi::Bind().Arg<Rows>().Ret<Rows>().Attr<int64_t>("activation"));
