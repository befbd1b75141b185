// Parallel loops on the threads of XLA's pool.
#ifndef NMJAX_KERNELS_CPU_THREADS_H_
#define NMJAX_KERNELS_CPU_THREADS_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace nmjax {

static inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// The loop that helpers work on; there is one in a process.
//
// A thread that sleeps takes longer to wake up than a layer with few rows takes to be
// computed. So a helper that finds nothing left to do looks out for the next loop for a
// moment before it goes back to the pool: in a chain of layers it is there in time.
//
// The caller takes chunks from the front and helpers take them from the back, so that a
// loop that is done again finds its data in the caches of the same processor cores.
class Board {
 public:
  static constexpr int64_t kMostChunks = 0xffff;  // of a loop that is shared

  static Board& Get() {
    static Board board;
    return board;
  }

  // Do `work(0)`, ..., `work(chunks - 1)`; false if another thread has the board.
  template <class Work>
  bool Run(xla::ffi::ThreadPool& pool, int64_t chunks, const Work& work) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    call_ = [](const void* work, int64_t chunk) {
      (*static_cast<const Work*>(work))(chunk);
    };
    work_ = &work;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t round = (left_.load(std::memory_order_relaxed) >> 32) + 1;
    left_.store(round << 32 | static_cast<uint64_t>(chunks), std::memory_order_release);
    Ask(pool, std::min<int64_t>(pool.num_threads(), chunks) - 1);
    while (TakeFirst()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins) {
      spins < 1000 ? Pause() : std::this_thread::yield();
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  static constexpr std::chrono::microseconds kPatience{30};

  // Ask for helpers if too few are at work.
  //
  // One that was asked may have to wait behind another thread, often behind this one,
  // while a core is idle; an operating system may take milliseconds to notice. So it
  // counts as missing until it has begun: the next loop asks another, which wakes up on
  // the idle core.
  void Ask(xla::ffi::ThreadPool& pool, int64_t wanted) {
    wanted_.store(wanted, std::memory_order_relaxed);
    const int64_t missing = wanted - at_work_.load(std::memory_order_relaxed);
    for (int64_t i = 0; i < missing; ++i) {
      if (asked_.load(std::memory_order_relaxed) >= pool.num_threads()) return;
      asked_.fetch_add(1, std::memory_order_relaxed);
      pool.Schedule([this] {
        const int64_t others = at_work_.fetch_add(1, std::memory_order_relaxed);
        if (others < wanted_.load(std::memory_order_relaxed)) Help();
        at_work_.fetch_sub(1, std::memory_order_relaxed);
        asked_.fetch_sub(1, std::memory_order_relaxed);
      });
    }
  }

  void Help() {
    using Clock = std::chrono::steady_clock;
    auto until = Clock::now() + kPatience;
    while (true) {
      bool found = false;
      while (TakeLast()) found = true;
      if (found) until = Clock::now() + kPatience;
      for (int i = 0; i < 32; ++i) Pause();
      if (!found && Clock::now() > until) break;
    }
  }

  // Do the first or the last chunk that is left. Whoever takes one knows that its loop is
  // not over, and that the fields which describe it do not change until it is done.
  bool TakeFirst() {
    return Take(0x10000, [](uint64_t left) { return left >> 16 & 0xffff; });
  }
  bool TakeLast() {
    return Take(-1, [](uint64_t left) { return (left & 0xffff) - 1; });
  }
  template <class Chunk>
  bool Take(int64_t step, const Chunk& chunk) {
    uint64_t left = left_.load(std::memory_order_acquire);
    do {
      if ((left >> 16 & 0xffff) >= (left & 0xffff)) return false;
    } while (!left_.compare_exchange_weak(left, left + step,
                                          std::memory_order_acq_rel));
    call_(work_, static_cast<int64_t>(chunk(left)));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  std::atomic<bool> busy_{false};
  std::atomic<uint64_t> left_{0};  // number of the loop, first chunk, end: 32, 16, 16 bits
  std::atomic<int64_t> done_{0}, wanted_{0}, at_work_{0}, asked_{0};
  void (*call_)(const void*, int64_t) = nullptr;
  const void* work_ = nullptr;
};

// Do `work(0)`, ..., `work(chunks - 1)` on the threads of a pool and on this one.
//
// Whoever is free takes the next chunk, and this thread takes those that nobody else
// does. It waits only for chunks that are being worked on: it cannot wait for ever, even
// if every thread of the pool is here.
template <class Work>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t chunks, const Work& work) {
  if (pool.num_threads() > 1 && chunks > 1 && chunks <= Board::kMostChunks) {
    if (Board::Get().Run(pool, chunks, work)) return;
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
}

}  // namespace nmjax

#endif  // NMJAX_KERNELS_CPU_THREADS_H_
