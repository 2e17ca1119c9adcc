// The threads that all kernels share: one pool, sized by the caller to the cores that the process may use.
//
// A job is `count` pieces that any thread may take, so that a thread whose core is taken away holds up one piece and
// not a fixed share. What a piece computes must not depend on who runs it: results are the same for any number of
// threads. Threads without work spin for some microseconds, as kernels of a step follow each other closely, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace atoma {

class Pool {
 public:
  using Piece = void (*)(void* context, int64_t piece);

  // `threads` counts the caller of `run`, too.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls `piece(context, i)` for each i in [0, count), and returns when all are done. `count` is below 2^32. A caller
  // that finds the pool at work for another one does its pieces alone. Pieces must not throw or call `run`.
  void run(int64_t count, Piece piece, void* context);

  // The same for a callable that takes the number of a piece.
  template <class Function>
  void for_each(int64_t count, Function&& function) {
    using F = std::remove_cv_t<std::remove_reference_t<Function>>;
    run(count, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, const_cast<F*>(&function));
  }

  // Of this process, with the number of threads that `set_pool_threads` gave; started by the first use.
  static Pool& shared();

 private:
  void work();
  bool take(uint32_t job, int64_t* piece);

  // A job's number in the upper half, how many of its pieces are free in the lower one: who comes too late for a job
  // finds none, whatever has begun meanwhile.
  std::atomic<uint64_t> free_{0};
  std::atomic<uint32_t> job_{0};  // what sleeping threads wait on
  std::atomic<uint32_t> done_{0};
  std::atomic<uint32_t> count_{0};
  std::atomic<Piece> piece_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> closing_{false};
  std::mutex owner_;  // held by the caller whose job it is
  std::vector<std::thread> workers_;
};

// For the next use of `Pool::shared()`; a pool that runs already is replaced when nothing uses it.
void set_pool_threads(int threads);

}  // namespace atoma
