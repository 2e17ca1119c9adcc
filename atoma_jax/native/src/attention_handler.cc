// The XLA FFI handler of attention: takes the step's arrays, checks shapes and every index, and runs `attend`.
//
// The cache comes in as results that share memory with the arguments, so that nothing of it is copied.
#include <string>

#include "ffi.h"
#include "paged_attention.h"
#include "pool.h"

namespace {

using Ints = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error refused(const std::string& problem) { return ffi::Error::InvalidArgument("attention: " + problem); }

bool has_shape(ffi::AnyBuffer::Dimensions dims, std::initializer_list<int64_t> shape) {
  return std::equal(dims.begin(), dims.end(), shape.begin(), shape.end());
}

bool find_format(ffi::DataType type, atoma::KvFormat* format) {
  switch (type) {
    case ffi::F32:
      *format = atoma::KvFormat::kFloat32;
      return true;
    case ffi::U16:
      *format = atoma::KvFormat::kBFloat16;
      return true;
    case ffi::F16:
      *format = atoma::KvFormat::kHalf;
      return true;
    case ffi::U8:
      *format = atoma::KvFormat::kFloat8;
      return true;
    case ffi::S8:
      *format = atoma::KvFormat::kInt8;
      return true;
    default:
      return false;
  }
}

bool has_scales(atoma::KvFormat format) {
  return format == atoma::KvFormat::kFloat8 || format == atoma::KvFormat::kInt8;
}

// Whether the pages of tokens first … end - 1 of a row are in its table and in the cache.
bool are_pages(const atoma::AttentionProblem& p, int64_t row, int64_t first, int64_t end) {
  if (row < 0 || row >= p.B || first < 0 || end > int64_t{p.W} * p.S) return false;
  for (int64_t at = first / p.S; at * p.S < end; at++) {
    const int32_t page = p.page_table[row * p.W + at];
    if (page < 0 || page >= p.P) return false;
  }
  return true;
}

// Empty where every index lies inside of what it points into.
std::string find_bad_index(const atoma::AttentionProblem& p) {
  for (int t = 0; t < p.T; t++)
    if (p.page[t] < 0 || p.page[t] >= p.P || p.slot[t] < 0 || p.slot[t] >= p.S)
      return "token " + std::to_string(t) + " goes to a page or slot that is not there";
  auto oldest = [&](int64_t position) { return std::max<int64_t>(position - p.window + 1, 0); };
  for (int row = 0; row < p.B; row++) {
    const int length = p.decode_lengths[row];
    if (length < 0 || (length > 0 && !are_pages(p, row, oldest(length - 1), length)))
      return "the context of row " + std::to_string(row) + " is not in its page table and the cache";
  }
  for (int block = 0; block < p.blocks; block++) {
    const int64_t token = p.block_token[block], size = p.block_size[block], position = p.block_position[block];
    if (token < 0 || size < 0 || position < 0 || token + size > p.T ||
        (size > 0 && !are_pages(p, p.block_row[block], oldest(position), position + size)))
      return "block " + std::to_string(block) + " of the work list is not in the step, its page table or the cache";
  }
  return "";
}

ffi::Error AttentionImpl(Floats q, Floats k, Floats v, Ints page, Ints slot, Ints page_table, Ints decode_lengths,
                         ffi::BufferR0<ffi::S32> used, Ints block_row, Ints block_token, Ints block_size,
                         Ints block_position, ffi::BufferR0<ffi::S32> layer, ffi::BufferR0<ffi::S32> window,
                         ffi::RemainingArgs cache, ffi::Result<Floats> out, ffi::RemainingRets new_cache, float scale,
                         float softcap) {
  if (cache.size() < 2 || new_cache.size() != cache.size()) return refused("the cache has K and V, and maybe scales");
  void* parts[4] = {};
  for (size_t i = 0; i < cache.size() && i < 4; i++) {
    const auto before = cache.get<ffi::AnyBuffer>(i);
    auto after = new_cache.get<ffi::AnyBuffer>(i);
    if (!before || !after) return refused("an array of the cache is missing");
    parts[i] = (*after)->untyped_data();
    if (before->untyped_data() != parts[i]) return refused("the cache was copied: its results must be its arguments");
  }
  const auto pages = *cache.get<ffi::AnyBuffer>(0);
  const auto dims = pages.dimensions(), shape = q.dimensions();
  atoma::KvFormat format;
  if (dims.size() != 5 || shape.size() != 3 || page_table.dimensions().size() != 2)
    return refused("q has 3 axes, the cache 5 and the page table 2");
  if (!find_format(pages.element_type(), &format)) return refused("the cache has a type that no format has");
  const int64_t T = shape[0], N = shape[1], H = shape[2], L = dims[0], P = dims[1], K = dims[2], S = dims[3];
  const int64_t B = page_table.dimensions()[0], W = page_table.dimensions()[1];
  const int64_t blocks = *used.typed_data(), index = *layer.typed_data();
  if (K < 1 || N % K || dims[4] != H || !has_shape(k.dimensions(), {T, K, H}) || !has_shape(v.dimensions(), {T, K, H}))
    return refused("shapes of q, k, v and the cache do not fit");
  if (!has_shape(out->dimensions(), {T, N, H}) || T < B || !has_shape(decode_lengths.dimensions(), {B}) ||
      !has_shape(page.dimensions(), {T}) || !has_shape(slot.dimensions(), {T}))
    return refused("shapes of the step's arrays do not fit");
  for (const auto& part : {block_row, block_token, block_size, block_position})
    if (part.element_count() < static_cast<size_t>(blocks)) return refused("the work list is shorter than it says");
  if (blocks < 0 || index < 0 || index >= L) return refused("no such layer, or a work list of negative size");
  if (cache.size() != (has_scales(format) ? 4 : 2)) return refused("scales do not fit the cache's type");

  const int64_t slots = P * K * S, bytes = pages.size_bytes() / std::max<int64_t>(L, 1);
  auto of_layer = [&](void* part) { return static_cast<char*>(part) + index * bytes; };
  auto scales = [&](void* part) { return part ? static_cast<float*>(part) + index * slots : nullptr; };
  auto size = [](int64_t n) { return static_cast<int>(n); };
  const atoma::AttentionProblem problem{
      .T = size(T), .B = size(B), .N = size(N), .K = size(K), .H = size(H), .P = size(P), .S = size(S), .W = size(W),
      .q = q.typed_data(), .k = k.typed_data(), .v = v.typed_data(), .format = format,
      .k_pages = of_layer(parts[0]), .v_pages = of_layer(parts[1]),
      .k_scale = scales(parts[2]), .v_scale = scales(parts[3]),
      .page = page.typed_data(), .slot = slot.typed_data(), .page_table = page_table.typed_data(),
      .decode_lengths = decode_lengths.typed_data(), .blocks = size(blocks), .block_row = block_row.typed_data(),
      .block_token = block_token.typed_data(), .block_size = block_size.typed_data(),
      .block_position = block_position.typed_data(), .window = *window.typed_data(), .scale = scale,
      .softcap = softcap, .out = out->typed_data()};
  const std::string bad = find_bad_index(problem);
  if (!bad.empty()) return refused(bad);
  atoma::attend(problem, atoma::active_attention(format), atoma::Pool::shared());
  return ffi::Error::Success();
}

}  // namespace

ATOMA_HANDLER(attention, AttentionImpl,
              ffi::Ffi::Bind()
                  .Arg<Floats>()  // q
                  .Arg<Floats>()  // k
                  .Arg<Floats>()  // v
                  .Arg<Ints>()    // page
                  .Arg<Ints>()    // slot
                  .Arg<Ints>()    // page_table
                  .Arg<Ints>()    // decode_lengths
                  .Arg<ffi::BufferR0<ffi::S32>>()  // blocks that are used
                  .Arg<Ints>()    // their rows
                  .Arg<Ints>()    // first tokens
                  .Arg<Ints>()    // sizes
                  .Arg<Ints>()    // positions
                  .Arg<ffi::BufferR0<ffi::S32>>()  // layer
                  .Arg<ffi::BufferR0<ffi::S32>>()  // window
                  .RemainingArgs()                 // cache: K, V, and their scales
                  .Ret<Floats>()
                  .RemainingRets()
                  .Attr<float>("scale")
                  .Attr<float>("softcap"));
