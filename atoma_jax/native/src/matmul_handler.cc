// XLA FFI handlers of products with tiled weights (matmul.h): shapes checked, a matrix of the stack picked by its index.
#include <cstdint>

#include "ffi.h"
#include "matmul.h"

namespace {

using atoma::Activations;
using atoma::Codes;
using atoma::Factors;
using atoma::FactorType;
using atoma::TiledWeight;

// What is static about a weight.
struct Form {
  int64_t columns;  // N
  int64_t inputs;   // K
  int64_t codes;    // of enum Codes
  int64_t zero;
  ffi::Span<const int32_t> table;  // 16 numbers, or none
};

// The arrays of a whole stack of weights. `mins` and supers have no elements where there are none.
struct Stack {
  const ffi::AnyBuffer& codes;
  const ffi::AnyBuffer& scales;
  const ffi::AnyBuffer& mins;
  const ffi::AnyBuffer& scale_supers;
  const ffi::AnyBuffer& min_supers;
};

ffi::Error Wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("tiled weight: ") + what); }

bool FactorTypeOf(ffi::DataType type, FactorType* out) {
  switch (type) {
    case ffi::DataType::F32:
      *out = FactorType::kFloat32;
      return true;
    case ffi::DataType::F16:
      *out = FactorType::kFloat16;
      return true;
    case ffi::DataType::BF16:
      *out = FactorType::kBfloat16;
      return true;
    case ffi::DataType::S8:
      *out = FactorType::kInt8;
      return true;
    default:
      return false;
  }
}

// Scales or mins of matrix `index`, [..., tiles, groups, 32], checked against the blocks of a row.
ffi::Error PickFactors(const ffi::AnyBuffer& values, const ffi::AnyBuffer& supers, const TiledWeight& weight,
                       int64_t matrices, int64_t index, Factors* out) {
  const auto shape = values.dimensions();
  if (shape.size() < 3 || shape[shape.size() - 1] != atoma::kTile || shape[shape.size() - 3] != weight.tiles()) {
    return Wrong("factors must be [..., tiles, groups, 32]");
  }
  if (!FactorTypeOf(values.element_type(), &out->type)) return Wrong("factors must be f32, f16, bf16 or int8");
  out->groups = shape[shape.size() - 2];
  const int64_t size = weight.tiles() * out->groups * atoma::kTile;
  if (static_cast<int64_t>(values.element_count()) != matrices * size) return Wrong("factors and codes differ in lead");
  out->values = static_cast<const char*>(values.untyped_data()) + index * size * size_of(out->type);
  if (supers.element_count() == 0) return ffi::Error::Success();
  const auto super_shape = supers.dimensions();
  if (super_shape.size() < 3 || supers.element_type() != ffi::DataType::F32) return Wrong("supers must be f32");
  out->supergroups = super_shape[super_shape.size() - 2];
  const int64_t super_size = weight.tiles() * out->supergroups * atoma::kTile;
  if (static_cast<int64_t>(supers.element_count()) != matrices * super_size || out->groups % out->supergroups != 0) {
    return Wrong("supers do not fit the factors");
  }
  out->supers = static_cast<const float*>(supers.untyped_data()) + index * super_size;
  return ffi::Error::Success();
}

ffi::Error Pick(const Form& form, const Stack& stack, int64_t index, TiledWeight* out) {
  if (form.codes < 0 || form.codes >= atoma::kStoredCodes) return Wrong("unknown kind of codes");
  out->kind = static_cast<Codes>(form.codes);
  out->N = form.columns;
  out->zero = static_cast<int>(form.zero);
  if (out->kind == Codes::kTable4) {
    if (form.table.size() != 16) return Wrong("a table has 16 numbers");
    for (int i = 0; i < 16; i++) out->table[i] = static_cast<uint8_t>(form.table[i] + 128);
  }
  const auto shape = stack.codes.dimensions();
  if (shape.size() < 3 || stack.codes.element_type() != ffi::DataType::U8) return Wrong("codes must be u8");
  out->blocks = shape[shape.size() - 2];
  if (form.inputs <= (out->blocks - 1) * atoma::kBlock || form.inputs > out->blocks * atoma::kBlock) {
    return Wrong("blocks do not hold the inputs");
  }
  const int64_t block_bytes = atoma::kTile * atoma::kBlock * bits_of(out->kind) / 8;
  if (shape[shape.size() - 1] != block_bytes || shape[shape.size() - 3] != out->tiles()) {
    return Wrong("codes must be [..., tiles, blocks, bytes]");
  }
  const int64_t size = out->tiles() * out->tile_bytes();
  const int64_t matrices = size == 0 ? 0 : static_cast<int64_t>(stack.codes.element_count()) / size;
  if (index < 0 || index >= matrices) return Wrong("the index is outside the stack");
  out->codes = static_cast<const uint8_t*>(stack.codes.untyped_data()) + index * size;
  if (auto error = PickFactors(stack.scales, stack.scale_supers, *out, matrices, index, &out->scales); error.failure()) {
    return error;
  }
  if (stack.mins.element_count() > 0) {
    if (auto error = PickFactors(stack.mins, stack.min_supers, *out, matrices, index, &out->mins); error.failure()) {
      return error;
    }
  }
  out->subs = out->scales.groups == 2 * out->blocks || out->mins.groups == 2 * out->blocks ? 2 : 1;
  const int64_t parts = out->blocks * out->subs;
  if (parts % out->scales.groups != 0) return Wrong("groups do not divide the blocks");
  if (out->mins.values != nullptr && parts % out->mins.groups != 0) return Wrong("groups do not divide the blocks");
  return ffi::Error::Success();
}

// Rows of x, and the norm in front of a product: its scale is empty where there is none.
ffi::Error PickInputs(const ffi::BufferR2<ffi::F32>& x, const ffi::BufferR1<ffi::F32>& norm, float eps,
                      atoma::Inputs* out) {
  out->rows = x.typed_data();
  if (norm.element_count() == 0) return ffi::Error::Success();
  if (norm.dimensions()[0] != x.dimensions()[1]) return Wrong("the norm's scale must be [K]");
  out->scale = norm.typed_data();
  out->eps = eps;
  return ffi::Error::Success();
}

// What a product [rows, N] is added to; empty where there is nothing.
ffi::Error PickResidual(const ffi::BufferR2<ffi::F32>& residual, int64_t rows, int64_t N, const float** out) {
  if (residual.element_count() == 0) return ffi::Error::Success();
  if (residual.dimensions()[0] != rows || residual.dimensions()[1] != N) {
    return Wrong("what the product is added to must be [rows, N]");
  }
  *out = residual.typed_data();
  return ffi::Error::Success();
}

bool IsGate(int64_t gate) { return gate >= 0 && gate <= 2; }

// What becomes of the product. The residual is empty, and the gate below 0, where there is none.
ffi::Error PickOutputs(const ffi::BufferR2<ffi::F32>& residual, int64_t gate, int64_t rows, int64_t columns,
                       const ffi::BufferR2<ffi::F32>& y, atoma::Outputs* out) {
  int64_t width = columns;
  if (gate >= 0) {
    if (!IsGate(gate)) return Wrong("unknown activation");
    if (residual.element_count() > 0) return Wrong("a gate and a residual behind one product");
    if (columns % (2 * atoma::kTile) != 0) return Wrong("gates and ups must be whole tiles");
    out->is_gated = true;
    out->gate = static_cast<atoma::Gate>(gate);
    width /= 2;
  }
  if (y.dimensions()[0] != rows || y.dimensions()[1] != width) return Wrong("the product must be [rows, N]");
  out->rows = y.typed_data();
  return PickResidual(residual, rows, columns, &out->residual);
}

ffi::Error MatmulImpl(ffi::BufferR2<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer mins,
                      ffi::AnyBuffer scale_supers, ffi::AnyBuffer min_supers, ffi::BufferR0<ffi::S32> index,
                      ffi::BufferR1<ffi::F32> norm, ffi::BufferR2<ffi::F32> residual,
                      ffi::ResultBufferR2<ffi::F32> y, int64_t columns, int64_t kind, int64_t zero,
                      ffi::Span<const int32_t> table, int64_t activations, float eps, int64_t gate) {
  const int64_t rows = x.dimensions()[0], K = x.dimensions()[1];
  TiledWeight weight;
  const Form form{columns, K, kind, zero, table};
  const Stack stack{codes, scales, mins, scale_supers, min_supers};
  if (auto error = Pick(form, stack, *index.typed_data(), &weight); error.failure()) return error;
  atoma::Inputs inputs{};
  if (auto error = PickInputs(x, norm, eps, &inputs); error.failure()) return error;
  atoma::Outputs outputs{};
  if (auto error = PickOutputs(residual, gate, rows, columns, *y, &outputs); error.failure()) return error;
  if (activations < 0 || activations > 3) return Wrong("unknown precision of activations");
  atoma::matmul(weight, inputs, rows, K, static_cast<Activations>(activations), outputs);
  return ffi::Error::Success();
}

ffi::Error NetImpl(ffi::BufferR2<ffi::F32> x, ffi::AnyBuffer up_codes, ffi::AnyBuffer up_scales, ffi::AnyBuffer up_mins,
                   ffi::AnyBuffer up_scale_supers, ffi::AnyBuffer up_min_supers, ffi::BufferR0<ffi::S32> up_index,
                   ffi::AnyBuffer down_codes, ffi::AnyBuffer down_scales, ffi::AnyBuffer down_mins,
                   ffi::AnyBuffer down_scale_supers, ffi::AnyBuffer down_min_supers,
                   ffi::BufferR0<ffi::S32> down_index, ffi::BufferR1<ffi::F32> norm, ffi::BufferR2<ffi::F32> residual,
                   ffi::ResultBufferR2<ffi::F32> y, int64_t up_columns, int64_t up_kind, int64_t up_zero,
                   ffi::Span<const int32_t> up_table, int64_t down_columns, int64_t down_kind, int64_t down_zero,
                   ffi::Span<const int32_t> down_table, int64_t activations, float eps, int64_t gate, bool adds_input) {
  const int64_t rows = x.dimensions()[0], K = x.dimensions()[1];
  if (up_columns % (2 * atoma::kTile) != 0) return Wrong("gates and ups must be whole tiles");
  TiledWeight up, down;
  const Form up_form{up_columns, K, up_kind, up_zero, up_table};
  const Stack up_stack{up_codes, up_scales, up_mins, up_scale_supers, up_min_supers};
  if (auto error = Pick(up_form, up_stack, *up_index.typed_data(), &up); error.failure()) return error;
  const Form down_form{down_columns, up_columns / 2, down_kind, down_zero, down_table};
  const Stack down_stack{down_codes, down_scales, down_mins, down_scale_supers, down_min_supers};
  if (auto error = Pick(down_form, down_stack, *down_index.typed_data(), &down); error.failure()) return error;
  atoma::Inputs inputs{};
  if (auto error = PickInputs(x, norm, eps, &inputs); error.failure()) return error;
  const float* added = nullptr;
  if (adds_input) {
    if (K != down_columns) return Wrong("a net that is added to its input must be as wide");
    added = x.typed_data();
  } else if (auto error = PickResidual(residual, rows, down_columns, &added); error.failure()) {
    return error;
  }
  if (y->dimensions()[0] != rows || y->dimensions()[1] != down_columns) return Wrong("the product must be [rows, N]");
  if (!IsGate(gate)) return Wrong("unknown activation");
  const auto how = static_cast<Activations>(activations);
  if (how != Activations::kGroups && how != Activations::kTwoPlanes) return Wrong("a net rounds groups by themselves");
  atoma::gated_net(up, down, inputs, rows, K, how, static_cast<atoma::Gate>(gate), added, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error RowsImpl(ffi::BufferR1<ffi::S32> ids, ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer mins,
                    ffi::AnyBuffer scale_supers, ffi::AnyBuffer min_supers, ffi::BufferR0<ffi::S32> index,
                    ffi::ResultBufferR2<ffi::F32> out, int64_t columns, int64_t kind, int64_t zero,
                    ffi::Span<const int32_t> table) {
  TiledWeight weight;
  const int64_t count = ids.dimensions()[0], K = out->dimensions()[1];
  const Form form{columns, K, kind, zero, table};
  const Stack stack{codes, scales, mins, scale_supers, min_supers};
  if (auto error = Pick(form, stack, *index.typed_data(), &weight); error.failure()) return error;
  if (out->dimensions()[0] != count) return Wrong("the rows must be [ids, K]");
  atoma::read_rows(weight, ids.typed_data(), count, K, out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

ATOMA_HANDLER(matmul, MatmulImpl,
              ffi::Ffi::Bind()
                  .Arg<ffi::BufferR2<ffi::F32>>()  // x
                  .Arg<ffi::AnyBuffer>()           // codes
                  .Arg<ffi::AnyBuffer>()           // scales
                  .Arg<ffi::AnyBuffer>()           // mins
                  .Arg<ffi::AnyBuffer>()           // scale_supers
                  .Arg<ffi::AnyBuffer>()           // min_supers
                  .Arg<ffi::BufferR0<ffi::S32>>()  // which matrix of the stack
                  .Arg<ffi::BufferR1<ffi::F32>>()  // scale of a norm in front, or empty
                  .Arg<ffi::BufferR2<ffi::F32>>()  // what the product is added to, or empty
                  .Ret<ffi::BufferR2<ffi::F32>>()
                  .Attr<int64_t>("columns")
                  .Attr<int64_t>("codes")
                  .Attr<int64_t>("zero")
                  .Attr<ffi::Span<const int32_t>>("table")
                  .Attr<int64_t>("activations")
                  .Attr<float>("eps")
                  .Attr<int64_t>("gate"));

ATOMA_HANDLER(net, NetImpl,
              ffi::Ffi::Bind()
                  .Arg<ffi::BufferR2<ffi::F32>>()  // x
                  .Arg<ffi::AnyBuffer>()           // gates and ups: codes
                  .Arg<ffi::AnyBuffer>()           // scales
                  .Arg<ffi::AnyBuffer>()           // mins
                  .Arg<ffi::AnyBuffer>()           // scale_supers
                  .Arg<ffi::AnyBuffer>()           // min_supers
                  .Arg<ffi::BufferR0<ffi::S32>>()  // which matrix of the stack
                  .Arg<ffi::AnyBuffer>()           // down: codes
                  .Arg<ffi::AnyBuffer>()           // scales
                  .Arg<ffi::AnyBuffer>()           // mins
                  .Arg<ffi::AnyBuffer>()           // scale_supers
                  .Arg<ffi::AnyBuffer>()           // min_supers
                  .Arg<ffi::BufferR0<ffi::S32>>()  // which matrix of the stack
                  .Arg<ffi::BufferR1<ffi::F32>>()  // scale of a norm in front, or empty
                  .Arg<ffi::BufferR2<ffi::F32>>()  // what the net is added to, or empty
                  .Ret<ffi::BufferR2<ffi::F32>>()
                  .Attr<int64_t>("up_columns")
                  .Attr<int64_t>("up_codes")
                  .Attr<int64_t>("up_zero")
                  .Attr<ffi::Span<const int32_t>>("up_table")
                  .Attr<int64_t>("down_columns")
                  .Attr<int64_t>("down_codes")
                  .Attr<int64_t>("down_zero")
                  .Attr<ffi::Span<const int32_t>>("down_table")
                  .Attr<int64_t>("activations")
                  .Attr<float>("eps")
                  .Attr<int64_t>("gate")
                  .Attr<bool>("adds_input"));

ATOMA_HANDLER(rows, RowsImpl,
              ffi::Ffi::Bind()
                  .Arg<ffi::BufferR1<ffi::S32>>()  // ids
                  .Arg<ffi::AnyBuffer>()           // codes
                  .Arg<ffi::AnyBuffer>()           // scales
                  .Arg<ffi::AnyBuffer>()           // mins
                  .Arg<ffi::AnyBuffer>()           // scale_supers
                  .Arg<ffi::AnyBuffer>()           // min_supers
                  .Arg<ffi::BufferR0<ffi::S32>>()  // which matrix of the stack
                  .Ret<ffi::BufferR2<ffi::F32>>()
                  .Attr<int64_t>("columns")
                  .Attr<int64_t>("codes")
                  .Attr<int64_t>("zero")
                  .Attr<ffi::Span<const int32_t>>("table"));
