// The XLA FFI handler of products with dense weights (dense.h): shapes checked, a matrix of the stack picked by its index.
#include <cstdint>
#include <limits>

#include "dense.h"
#include "ffi.h"

namespace {

using atoma::DenseType;
using atoma::DenseWeight;

ffi::Error Wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("dense weight: ") + what); }

ffi::Error DenseImpl(ffi::BufferR2<ffi::F32> x, ffi::AnyBuffer values, ffi::BufferR0<ffi::S32> index,
                     bool may_round, ffi::ResultBufferR2<ffi::F32> y) {
  const auto shape = values.dimensions();
  if (shape.size() < 2) return Wrong("must be [..., N, K]");
  DenseWeight weight;
  weight.N = shape[shape.size() - 2];
  weight.K = shape[shape.size() - 1];
  int64_t bytes = 2;
  switch (values.element_type()) {
    case ffi::DataType::F32:
      weight.type = DenseType::kFloat32;
      bytes = 4;
      break;
    case ffi::DataType::BF16:
      weight.type = DenseType::kBfloat16;
      break;
    case ffi::DataType::F16:
      weight.type = DenseType::kFloat16;
      break;
    default:
      return Wrong("must be f32, bf16 or f16");
  }
  const int64_t rows = x.dimensions()[0], size = weight.N * weight.K;
  if (x.dimensions()[1] != weight.K || weight.K > std::numeric_limits<int>::max()) return Wrong("x must be [rows, K]");
  if (y->dimensions()[0] != rows || y->dimensions()[1] != weight.N) return Wrong("the product must be [rows, N]");
  const int64_t matrices = size == 0 ? 0 : static_cast<int64_t>(values.element_count()) / size;
  const int64_t at = *index.typed_data();
  if (at < 0 || at >= matrices) return Wrong("the index is outside the stack");
  weight.values = static_cast<const char*>(values.untyped_data()) + at * size * bytes;
  atoma::dense_matmul(weight, x.typed_data(), rows, may_round, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

ATOMA_HANDLER(dense, DenseImpl,
              ffi::Ffi::Bind()
                  .Arg<ffi::BufferR2<ffi::F32>>()  // x
                  .Arg<ffi::AnyBuffer>()           // the stack
                  .Arg<ffi::BufferR0<ffi::S32>>()  // which matrix of it
                  .Attr<bool>("may_round")
                  .Ret<ffi::BufferR2<ffi::F32>>());
