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
class Board {
 public:
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
    chunks_ = chunks;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t round = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(round << 32 | static_cast<uint64_t>(chunks),
                  std::memory_order_release);
    const int64_t wanted = std::min<int64_t>(pool.num_threads(), chunks) - 1;
    while (helpers_.load(std::memory_order_relaxed) < wanted) {
      helpers_.fetch_add(1, std::memory_order_relaxed);
      pool.Schedule([this] { Help(); });
    }
    while (TakeOne()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins) {
      spins < 10000 ? Pause() : std::this_thread::yield();
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  static constexpr std::chrono::microseconds kPatience{30};

  // Do a chunk that is left. Whoever takes one knows that its loop is not over, and that
  // the fields which describe it do not change until the chunk is done.
  bool TakeOne() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
      if (!(ticket & 0xffffffff)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1,
                                            std::memory_order_acq_rel));
    call_(work_, chunks_ - static_cast<int64_t>(ticket & 0xffffffff));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void Help() {
    using Clock = std::chrono::steady_clock;
    auto until = Clock::now() + kPatience;
    while (true) {
      bool found = false;
      while (TakeOne()) found = true;
      if (found) until = Clock::now() + kPatience;
      for (int i = 0; i < 32; ++i) Pause();
      if (!found && Clock::now() > until) break;
    }
    helpers_.fetch_sub(1, std::memory_order_relaxed);
  }

  std::atomic<bool> busy_{false};
  std::atomic<uint64_t> ticket_{0};  // number of the loop, and chunks left of it
  std::atomic<int64_t> done_{0}, helpers_{0};
  void (*call_)(const void*, int64_t) = nullptr;
  const void* work_ = nullptr;
  int64_t chunks_ = 0;
};

// Do `work(0)`, ..., `work(chunks - 1)` on the threads of a pool and on this one.
//
// Whoever is free takes the next chunk, and this thread takes those that nobody else
// does. It waits only for chunks that are being worked on: it cannot wait for ever, even
// if every thread of the pool is here.
template <class Work>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t chunks, const Work& work) {
  if (pool.num_threads() > 1 && chunks > 1) {
    if (Board::Get().Run(pool, chunks, work)) return;
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
}

}  // namespace nmjax

#endif  // NMJAX_KERNELS_CPU_THREADS_H_
