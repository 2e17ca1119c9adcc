// What this processor can do at most, for bench/roofline.py: bytes read from memory a second, and products of int8 with
// their sums a second. Prints "BYTES PRODUCTS" of all threads together, the median of several runs: on a virtual machine
// single runs are interrupted, or have for a moment what other machines do not use. Argument: threads.
//
// Compiled for the processor at hand. Products are those of its fastest instruction for them: vpdpbusd, or vpmaddubsw
// and a sum of words, or what the compiler makes of plain C++.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRuns = 12;
constexpr int64_t kBytes = int64_t{256} << 20;  // more than any cache of a core's share
constexpr int64_t kSteps = 10000000;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The time that all threads take for one part each, begun together.
template <class Part>
double typical(int threads, Part part) {
  std::vector<double> times;
  for (int run = 0; run < kRuns; run++) {
    std::atomic<int> waiting{threads};
    std::vector<double> begin(threads), end(threads);
    std::vector<std::thread> all;
    for (int thread = 0; thread < threads; thread++) {
      all.emplace_back([&, thread] {
        waiting.fetch_sub(1);
        while (waiting.load() > 0) {
        }
        begin[thread] = now();
        part(thread);
        end[thread] = now();
      });
    }
    for (auto& thread : all) thread.join();
    times.push_back(*std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end()));
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

std::atomic<uint64_t> sink{0};  // so that nothing is left out as without effect

void read(const uint64_t* from, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    __builtin_prefetch(from + i + 512);
    for (int lane = 0; lane < 8; lane++) sums[lane] += from[i + lane];
  }
  for (uint64_t sum : sums) sink += sum;
}

#if defined(__AVX512VNNI__)
constexpr int64_t kProducts = 64;
using Sum = __m512i;
Sum start() { return _mm512_setzero_si512(); }
Sum step(Sum sum, Sum w, Sum x) {
  sum = _mm512_dpbusd_epi32(sum, w, x);
  asm("" : "+v"(sum));
  return sum;
}
Sum repeat(int32_t x) { return _mm512_set1_epi32(x); }
#elif defined(__AVX2__)
constexpr int64_t kProducts = 32;
using Sum = __m256i;
Sum start() { return _mm256_setzero_si256(); }
Sum step(Sum sum, Sum w, Sum x) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
  asm("" : "+x"(sum));
  return sum;
}
Sum repeat(int32_t x) { return _mm256_set1_epi32(x); }
#else
constexpr int64_t kProducts = 4;
struct Sum {
  int32_t lanes[4];
};
Sum start() { return Sum{}; }
Sum step(Sum sum, Sum w, Sum x) {
  for (int i = 0; i < 4; i++) sum.lanes[i] += w.lanes[i] * x.lanes[i];
  return sum;
}
Sum repeat(int32_t x) { return {{x, x, x, x}}; }
#endif

// Four rows by two vectors of columns, which fill no more registers than there are: every sum is of products of its own,
// and their operands are read anew each time, as a kernel reads new ones.
void multiply() {
  Sum sums[4][2];
#pragma GCC unroll 4
  for (int row = 0; row < 4; row++) sums[row][0] = sums[row][1] = start();
  int32_t values[6] = {1, 2, 3, 4, 5, 6};
  for (int64_t i = 0; i < kSteps; i++) {
    asm volatile("" : : "r"(values) : "memory");
    const Sum first = repeat(values[4]), second = repeat(values[5]);
#pragma GCC unroll 4
    for (int row = 0; row < 4; row++) {
      const Sum x = repeat(values[row]);
      sums[row][0] = step(sums[row][0], first, x);
      sums[row][1] = step(sums[row][1], second, x);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < 4; row++) {
    const Sum both[2] = {sums[row][0], sums[row][1]};  // whose address is taken: those of `sums` stay in registers
    sink += reinterpret_cast<const uint8_t*>(both)[0] + reinterpret_cast<const uint8_t*>(both)[sizeof(Sum)];
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::vector<uint64_t> memory(kBytes / 8, 1);
  const int64_t share = kBytes / 8 / threads;
  const double reading = typical(threads, [&](int thread) { read(memory.data() + thread * share, share); });
  const double multiplying = typical(threads, [](int) { multiply(); });
  std::printf("%.6e %.6e\n", 8.0 * static_cast<double>(share) * threads / reading,
              8.0 * kSteps * kProducts * threads / multiplying);
  return sink.load() == 1;
}
