// The XLA FFI handlers of draws and surveys (sampling.h): shapes checked.
#include <cstdint>
#include <string>

#include "ffi.h"
#include "sampling.h"

namespace {

ffi::Error Wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("rows of logits: ") + what); }

template <class... Buffers>
bool HaveRows(int64_t rows, const Buffers&... buffers) {
  return ((buffers.dimensions()[0] == rows) && ...);
}

using Logits = ffi::BufferR2<ffi::F32>;
using Floats = ffi::BufferR1<ffi::F32>;
using Whole = ffi::BufferR1<ffi::S32>;

ffi::Error DrawImpl(Logits logits, Floats top, Floats temperature, Floats floor, Whole top_k, Floats top_p,
                    ffi::BufferR1<ffi::U32> bits, ffi::BufferR1<ffi::PRED> active, ffi::Result<Whole> tokens) {
  const int64_t rows = logits.dimensions()[0], V = logits.dimensions()[1];
  if (!HaveRows(rows, top, temperature, floor, top_k, top_p, bits, active, *tokens)) {
    return Wrong("settings and tokens must be [rows]");
  }
  if (V == 0) return Wrong("a vocabulary has tokens");
  const atoma::DrawRows draws{logits.typed_data(), top.typed_data(),   temperature.typed_data(), floor.typed_data(),
                              top_k.typed_data(),  top_p.typed_data(), bits.typed_data(),        active.typed_data()};
  atoma::draw_tokens(draws, rows, V, tokens->typed_data());
  return ffi::Error::Success();
}

ffi::Error SurveyImpl(Logits logits, Floats top, Whole token, ffi::BufferR1<ffi::PRED> active,
                      ffi::Result<Floats> norms, ffi::Result<Whole> ranks) {
  const int64_t rows = logits.dimensions()[0], V = logits.dimensions()[1];
  if (!HaveRows(rows, top, token, active, *norms, *ranks)) return Wrong("tokens and results must be [rows]");
  const atoma::SurveyRows asked{logits.typed_data(), top.typed_data(), token.typed_data(), active.typed_data()};
  atoma::survey_rows(asked, rows, V, norms->typed_data(), ranks->typed_data());
  return ffi::Error::Success();
}

}  // namespace

ATOMA_HANDLER(draw, DrawImpl,
              ffi::Ffi::Bind()
                  .Arg<Logits>()
                  .Arg<Floats>()  // top
                  .Arg<Floats>()  // temperature
                  .Arg<Floats>()  // floor
                  .Arg<Whole>()   // top-k
                  .Arg<Floats>()  // top-p
                  .Arg<ffi::BufferR1<ffi::U32>>()   // random bits
                  .Arg<ffi::BufferR1<ffi::PRED>>()  // active
                  .Ret<Whole>());
ATOMA_HANDLER(survey, SurveyImpl,
              ffi::Ffi::Bind()
                  .Arg<Logits>()
                  .Arg<Floats>()  // top
                  .Arg<Whole>()   // token
                  .Arg<ffi::BufferR1<ffi::PRED>>()  // active
                  .Ret<Floats>()
                  .Ret<Whole>());
