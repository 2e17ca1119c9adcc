// The primitive operations of kernels in plain C++: what any processor runs, and what the others are checked against.
//
// Every variant has a struct of this shape. In an anonymous namespace, so that what is made of it stays in its object
// file: a function that two files define alike would be linked once, perhaps with instructions that a CPU lacks.
// Vectors are the compilers' own (`vector_size`), of the 16 bytes that every 64-bit processor has registers for.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

namespace atoma {
namespace {

struct Portable {
  static constexpr int kLanes = 4;         // of floats, and of the int32 that four bytes sum to
  static constexpr int kRegisters = 16;    // for vectors
  static constexpr int kStoredRows = 0;  // here the arithmetic takes longest
  static constexpr int vectors(int rows) { return rows == 1 ? 4 : 2; }  // of columns at once

  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef int8_t SignedBytes __attribute__((vector_size(16)));
  typedef int16_t Words __attribute__((vector_size(32)));
  typedef int32_t Pairs __attribute__((vector_size(32)));

  template <class Vector>
  static Vector from_memory(const void* from) {
    Vector out;
    std::memcpy(&out, from, sizeof out);
    return out;
  }

  static Floats load(const float* from) { return from_memory<Floats>(from); }
  static void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
  static Floats set(float x) { return Floats{x, x, x, x}; }
  static Ints set(int32_t x) { return Ints{x, x, x, x}; }
  static Floats add(Floats x, Floats y) { return x + y; }
  static Floats sub(Floats x, Floats y) { return x - y; }
  static Floats mul(Floats x, Floats y) { return x * y; }
  // x·y + z, and z − x·y; rounded once where the processor can.
  static Floats fma(Floats x, Floats y, Floats z) { return x * y + z; }
  static Floats fnma(Floats x, Floats y, Floats z) { return z - x * y; }
  static Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
  static Ints add(Ints x, Ints y) { return x + y; }
  static Ints sub(Ints x, Ints y) { return x - y; }
  static Ints join_planes(Ints x, Ints y) { return 254 * x + y; }

  static Floats load_f16(const uint16_t* from) {
    return Floats{float_of_half(from[0]), float_of_half(from[1]), float_of_half(from[2]), float_of_half(from[3])};
  }
  static Floats load_bf16(const uint16_t* from) {
    return Floats{float_of_bfloat(from[0]), float_of_bfloat(from[1]), float_of_bfloat(from[2]),
                  float_of_bfloat(from[3])};
  }
  static Floats load_int8(const int8_t* from) {
    return Floats{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
  }

  // |x| as bits, which order as the numbers do, NaN above infinity.
  static Ints magnitude_bits(Floats x) { return from_memory<Ints>(&x) & 0x7fffffff; }
  static Ints max(Ints x, Ints y) { return x > y ? x : y; }
  static int32_t largest(Ints x) {
    const int32_t left = x[0] > x[1] ? x[0] : x[1], right = x[2] > x[3] ? x[2] : x[3];
    return left > right ? left : right;
  }
  // The sum of all lanes.
  static int32_t total(Ints x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  // Half to even, for |x| below 2^22: the sum has no bits left for a fraction.
  static Ints rounded(Floats x) {
    const Floats magic = set(12582912.0f);  // 1.5 · 2^23
    return __builtin_convertvector((x + magic) - magic, Ints);
  }
  // 32 whole numbers of [-128, 127] as bytes.
  static void store_int8(int8_t* to, const Ints (&x)[8]) {
    for (int i = 0; i < 8; i++) {
      for (int lane = 0; lane < kLanes; lane++) to[i * kLanes + lane] = static_cast<int8_t>(x[i][lane]);
    }
  }

  static Bytes load_bytes(const uint8_t* from) { return from_memory<Bytes>(from); }
  // Four bytes again and again.
  static Bytes repeat4(const int8_t* from) {
    const Ints repeated = set(from_memory<int32_t>(from));
    return from_memory<Bytes>(&repeated);
  }
  // The bits of `mask` of each byte, moved down by `shift` before.
  template <int shift, int mask>
  static Bytes field(Bytes x) {
    return (x >> shift) & static_cast<uint8_t>(mask);
  }
  static Bytes either(Bytes x, Bytes y) { return x | y; }
  static void store_bytes(uint8_t* to, Bytes x) { std::memcpy(to, &x, sizeof x); }
  static Bytes load_table(const uint8_t* sixteen) { return from_memory<Bytes>(sixteen); }
  static Bytes look_up(Bytes table, Bytes codes) {
    Bytes out{};
    for (int i = 0; i < 4 * kLanes; i++) out[i] = table[codes[i]];
    return out;
  }

  // Sums of four products of numbers, below 2^8 in size, and int8.
  static Ints sum4(Words numbers, Bytes x) {
    const Words products = numbers * __builtin_convertvector(from_memory<SignedBytes>(&x), Words);
    const Pairs both = from_memory<Pairs>(&products);
    const Pairs pairs = (both >> 16) + ((both << 16) >> 16);  // of each word pair
    return __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6) + __builtin_shufflevector(pairs, pairs, 1, 3, 5, 7);
  }

  // Sums of four products of bytes: codes below 16 (`Small`), below 64 (`Medium`), or any (`Wide`), times int8 above
  // -128. What `Wide` sums up counts codes less `kBias`. `Medium` takes two steps at once. At most eight steps of
  // `Small`, a hundred of the others.
  struct Products {
    static constexpr int kMaxRows = 2;  // rows of x that a product works on at once; of two planes half as many
    using Weights = Words;
    using Sum = Ints;
    static Sum zero() { return set(int32_t{0}); }
    static Sum step(Sum sum, Weights w, Bytes x) { return sum + sum4(w, x); }
    static Ints finish(Sum sum) { return sum; }
  };
  struct Wide : Products {
    static constexpr int kBias = 0;  // a code is a number + 128, and the sum is the numbers' already
    static Weights prepare(Bytes codes) { return __builtin_convertvector(codes, Words) - 128; }
  };
  struct Small : Products {
    static Weights prepare(Bytes codes) { return __builtin_convertvector(codes, Words); }
  };
  struct Medium : Small {
    static Sum two_steps(Sum sum, Weights w0, Bytes x0, Weights w1, Bytes x1) { return step(step(sum, w0, x0), w1, x1); }
  };
};

}  // namespace
}  // namespace atoma
