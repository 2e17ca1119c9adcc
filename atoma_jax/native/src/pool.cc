// The pool of pool.h.
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <memory>

namespace atoma {

namespace {

// About 20 µs on the machines of today: longer than the gap between two kernels of a step, shorter than a wake-up pays.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Kernels flush denormal numbers to zero, as XLA's threads do, so that a result does not depend on the thread.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // FTZ and DAZ
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
  closing_.store(true);
  job_.fetch_add(1);
  job_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::take(uint32_t job, int64_t* piece) {
  uint64_t free = free_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(free >> 32) == job && static_cast<uint32_t>(free) > 0) {
    if (free_.compare_exchange_weak(free, free - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
      *piece = int64_t{count_.load(std::memory_order_relaxed)} - static_cast<uint32_t>(free);
      return true;
    }
  }
  return false;
}

void Pool::work() {
  FlushDenormals flush;
  uint32_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpins && job_.load(std::memory_order_acquire) == seen; spin++) relax();
    if (job_.load(std::memory_order_acquire) == seen) {
      sleepers_.fetch_add(1);
      job_.wait(seen);
      sleepers_.fetch_sub(1);
    }
    if (closing_.load()) return;
    seen = job_.load(std::memory_order_acquire);
    int64_t piece;
    // The fields are read before a piece is taken: once it is, the job cannot have ended, so they were this job's.
    for (;;) {
      const Piece function = piece_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      if (!take(seen, &piece)) break;
      function(context, piece);
      const uint32_t done = done_.fetch_add(1, std::memory_order_acq_rel) + 1;
      if (done == count_.load(std::memory_order_relaxed)) done_.notify_all();
    }
  }
}

void Pool::run(int64_t count, Piece piece, void* context) {
  FlushDenormals flush;
  std::unique_lock<std::mutex> own(owner_, std::defer_lock);
  if (workers_.empty() || count <= 1 || !own.try_lock()) {
    for (int64_t i = 0; i < count; i++) piece(context, i);
    return;
  }
  const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  const uint32_t total = static_cast<uint32_t>(count);
  // No piece of the last job is free any more, so nobody takes one while the fields change.
  piece_.store(piece, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  count_.store(total, std::memory_order_relaxed);
  free_.store(static_cast<uint64_t>(job) << 32 | total, std::memory_order_release);
  job_.store(job, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) job_.notify_all();

  int64_t mine;
  while (take(job, &mine)) {
    piece(context, mine);
    done_.fetch_add(1, std::memory_order_acq_rel);
  }
  uint32_t finished = done_.load(std::memory_order_acquire);
  for (int spin = 0; spin < kSpins && finished != total; spin++) {
    relax();
    finished = done_.load(std::memory_order_acquire);
  }
  while (finished != total) {  // the other's core was taken away: leave it this one
    done_.wait(finished);
    finished = done_.load(std::memory_order_acquire);
  }
}

namespace {

std::mutex shared_mutex;
int shared_threads = 1;
// Never destroyed at exit: XLA's threads may still be in a kernel while the process ends.
Pool* shared_pool = nullptr;

}  // namespace

Pool& Pool::shared() {
  std::lock_guard<std::mutex> lock(shared_mutex);
  if (shared_pool == nullptr) shared_pool = new Pool(shared_threads);
  return *shared_pool;
}

void set_pool_threads(int threads) {
  std::lock_guard<std::mutex> lock(shared_mutex);
  if (shared_threads == threads) return;
  shared_threads = threads;
  delete shared_pool;  // the caller sees to it that no kernel runs
  shared_pool = nullptr;
}

}  // namespace atoma
