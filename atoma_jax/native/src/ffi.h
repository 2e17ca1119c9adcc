// What every file of XLA FFI handlers includes: the API, the name it has here, and how a handler is exported.
//
// A handler is a function FOO_impl and `ATOMA_HANDLER(foo, FOO_impl, bindings)`, which Python finds as `atoma_foo` and
// registers under that name (atoma_jax/native/library.py). Handlers check shapes and call kernels; they hold no loops.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define ATOMA_EXPORT extern "C" __attribute__((visibility("default")))
#define ATOMA_HANDLER(name, implementation, binding) \
  ATOMA_EXPORT XLA_FFI_Error* atoma_##name(XLA_FFI_CallFrame* frame); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(atoma_##name, implementation, binding)
