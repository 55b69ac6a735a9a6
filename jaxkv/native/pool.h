// The threads that help a caller with units of work. They wait a moment for the next job before
// they sleep: in a decode step the next one is a few microseconds away, and waking takes ten times
// as long as that.
//
// One job at a time. A caller that finds the pool busy does its work alone, so callers never wait
// for each other. A child of fork() gets a new pool. Nothing is destroyed at exit: the threads end
// with the process, wherever they are.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace jaxkv {

// How a thread rounds, and whether it flushes denormals, as XLA's own threads do.
#if defined(__SSE__)
using Arithmetic = unsigned;
inline Arithmetic GetArithmetic() { return _mm_getcsr(); }
inline void SetArithmetic(Arithmetic arithmetic) { _mm_setcsr(arithmetic); }
inline void Pause() { _mm_pause(); }
#else
using Arithmetic = std::fenv_t;
inline Arithmetic GetArithmetic() {
  Arithmetic arithmetic;
  std::fegetenv(&arithmetic);
  return arithmetic;
}
inline void SetArithmetic(const Arithmetic& arithmetic) { std::fesetenv(&arithmetic); }
inline void Pause() { std::atomic_signal_fence(std::memory_order_seq_cst); }
#endif

class Pool {
 public:
  // Of this process.
  static Pool& Get() {
    static const bool made = [] {
      pool_of_process_ = new Pool;
      return pthread_atfork(nullptr, nullptr, [] { pool_of_process_ = new Pool; }) == 0;
    }();
    (void)made;
    return *pool_of_process_;
  }

  // work(unit) for each unit in [0, units), on up to `threads` threads, this one among them.
  // Sleeping threads are woken if `worth_waking`.
  template <typename Function>
  void Run(int64_t units, int64_t threads, bool worth_waking, const Function& work) {
    if (threads <= 1 || units <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t unit = 0; unit < units; ++unit) work(unit);
      return;
    }
    Start(std::min(threads - 1, kMostWorkers));
    call_ = [](const void* context, int64_t unit) {
      (*static_cast<const Function*>(context))(unit);
    };
    context_ = &work;
    arithmetic_ = GetArithmetic();
    for (first_ = 0; first_ < units; first_ += kMostUnits)
      RunTogether(std::min(units - first_, kMostUnits), worth_waking);
    busy_.store(false, std::memory_order_release);
  }

 private:
  // What is left of the job in one word, so that a unit is taken, and known to be of a job that is
  // under way, by one compare-and-swap: number of the job (32 bits), units (16), next unit (16).
  using Ticket = uint64_t;
  static constexpr int64_t kMostUnits = 0xffff;
  static int64_t Units(Ticket ticket) { return ticket >> 16 & 0xffff; }
  static int64_t Next(Ticket ticket) { return ticket & 0xffff; }
  static bool Any(Ticket ticket) { return Next(ticket) < Units(ticket); }

  static constexpr int64_t kMostWorkers = 31;  // fewer saturate memory
  static constexpr auto kSpin = std::chrono::microseconds(100);
  static constexpr int kLooks = 16;  // at the ticket, between looks at the clock
  static constexpr int kPausesUntilYield = 1 << 10;

  void Start(int64_t wanted) {
    for (; workers_ < wanted; ++workers_) {
      try {
        std::thread([this] { Help(); }).detach();
      } catch (const std::system_error&) {  // the system gives no more threads: go on with these
        return;
      }
    }
  }

  void RunTogether(int64_t units, bool worth_waking) {
    done_.store(0, std::memory_order_relaxed);
    const Ticket job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(job << 32 | units << 16);
    if (worth_waking && sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);  // not between a worker's look and its sleep
      wake_.notify_all();
    }
    while (TakeOne([] {})) {
    }
    for (int pauses = 0; done_.load(std::memory_order_acquire) < units; ++pauses) {
      if (pauses < kPausesUntilYield)
        Pause();
      else
        std::this_thread::yield();  // a worker has lost its core
    }
  }

  // Does one unit of the job under way; false if none is left.
  template <typename Function>
  bool TakeOne(const Function& prepare) {
    Ticket ticket = ticket_.load(std::memory_order_acquire);
    do {
      if (!Any(ticket)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
    // The caller cannot leave before this unit is done, so all that it wrote is still there.
    prepare();
    call_(context_, first_ + Next(ticket));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  bool LookFor(std::chrono::nanoseconds time) {
    const auto until = std::chrono::steady_clock::now() + time;
    do {
      for (int look = 0; look < kLooks; ++look) {
        if (Any(ticket_.load(std::memory_order_acquire))) return true;
        Pause();
      }
    } while (std::chrono::steady_clock::now() < until);
    return false;
  }

  // A worker's life.
  void Help() {
    for (;;) {
      while (TakeOne([this] { SetArithmetic(arithmetic_); })) {
      }
      if (LookFor(kSpin)) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleeping_;
      wake_.wait(lock, [this] { return Any(ticket_.load()); });
      --sleeping_;
    }
  }

  static inline Pool* pool_of_process_ = nullptr;

  std::atomic<bool> busy_{false};
  int64_t workers_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t first_ = 0;
  Arithmetic arithmetic_;
  // Each on a cache line of its own: all threads look at the first all the time.
  alignas(64) std::atomic<Ticket> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int64_t> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace jaxkv
