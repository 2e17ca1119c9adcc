// The XLA FFI handlers of norms, heads and activations (rowwise.h): shapes checked.
#include <algorithm>
#include <cstdint>
#include <string>

#include "ffi.h"
#include "rowwise.h"

namespace {

using Rows = ffi::BufferR2<ffi::F32>;
using Scale = ffi::BufferR1<ffi::F32>;
using HeadRows = ffi::BufferR3<ffi::F32>;

ffi::Error Wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("rows of activations: ") + what); }

ffi::Error RmsNormImpl(Rows x, Scale scale, ffi::Result<Rows> out, float eps) {
  const int64_t rows = x.dimensions()[0], D = x.dimensions()[1];
  if (scale.dimensions()[0] != D) return Wrong("the scale must be [D]");
  if (out->dimensions()[0] != rows || out->dimensions()[1] != D) return Wrong("the result must be [rows, D]");
  atoma::rms_norm(x.typed_data(), scale.typed_data(), rows, D, eps, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error RotateHeadsImpl(Rows qkv, Rows cos, Rows sin, Scale q_scale, Scale k_scale, ffi::Result<HeadRows> q,
                           ffi::Result<HeadRows> k, ffi::Result<HeadRows> v, float eps) {
  const auto shape = q->dimensions(), of_k = k->dimensions(), of_v = v->dimensions();
  const int64_t tokens = shape[0], N = shape[1], H = shape[2], K = of_k[1], half = cos.dimensions()[1];
  if (K < 1 || N % K != 0) return Wrong("kv heads do not divide the heads");
  if (of_k[0] != tokens || of_k[2] != H || !std::equal(of_k.begin(), of_k.end(), of_v.begin(), of_v.end())) {
    return Wrong("keys and values must be [tokens, K, H]");
  }
  if (qkv.dimensions()[0] != tokens || qkv.dimensions()[1] != (N + 2 * K) * H) {
    return Wrong("the projection must be [tokens, K · (N / K + 2) · H]");
  }
  for (const Rows& table : {cos, sin}) {
    if (table.dimensions()[0] != tokens || table.dimensions()[1] != half) return Wrong("tables must be [tokens, half]");
  }
  if (2 * half > H) return Wrong("more rotates than a head has");
  const auto scale_of = [&](const Scale& scale) { return scale.element_count() == 0 ? nullptr : scale.typed_data(); };
  for (const Scale& scale : {q_scale, k_scale}) {
    if (scale_of(scale) != nullptr && scale.dimensions()[0] != H) return Wrong("the scale must be [H], or empty");
  }
  const atoma::Heads heads{K, N / K, H, half, scale_of(q_scale), scale_of(k_scale), eps};
  atoma::rotate_heads(heads, qkv.typed_data(), cos.typed_data(), sin.typed_data(), tokens, q->typed_data(),
                      k->typed_data(), v->typed_data());
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
                  .Arg<Rows>()   // x
                  .Arg<Scale>()  // scale
                  .Ret<Rows>()
                  .Attr<float>("eps"));
ATOMA_HANDLER(rotate_heads, RotateHeadsImpl,
              ffi::Ffi::Bind()
                  .Arg<Rows>()   // qkv
                  .Arg<Rows>()   // cos
                  .Arg<Rows>()   // sin
                  .Arg<Scale>()  // of a norm of queries, or empty
                  .Arg<Scale>()  // of keys
                  .Ret<HeadRows>()
                  .Ret<HeadRows>()
                  .Ret<HeadRows>()
                  .Attr<float>("eps"));
ATOMA_HANDLER(gated, GatedImpl, ffi::Ffi::Bind().Arg<Rows>().Ret<Rows>().Attr<int64_t>("activation"));
