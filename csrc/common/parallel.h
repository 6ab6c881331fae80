// Work on XLA's own intra-op thread pool: the calling thread takes part, so that a handler which
// itself runs on that pool can never wait for work that nobody is left to do.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_flash {

// Hands out the numbers 0 .. count-1, each once, in order, to whoever asks first.
class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}

  bool next(int64_t& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }
  void abandon() { next_.store(count_, std::memory_order_relaxed); }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

// Calls body(Tasks&) on the caller and on up to num_threads - 1 pool threads at the same time; each
// call takes tasks until none is left. Returns when every body that began has ended: a pool thread
// that comes late finds the door closed and never touches `body`.
template <typename Body>
xla::ffi::Error run_tasks(xla::ffi::ThreadPool& pool, int64_t num_tasks, Body&& body) {
  struct Shared {
    explicit Shared(int64_t count) : tasks(count) {}
    Tasks tasks;
    std::mutex mutex;
    std::condition_variable all_left;
    int inside = 0;
    bool is_closed = false;
    bool has_failed = false;
  };
  const auto shared = std::make_shared<Shared>(num_tasks);

  // An exception must not cross into XLA; running out of memory is the only one there is.
  const auto guarded = [&body, raw = shared.get()] {
    try {
      body(raw->tasks);
    } catch (const std::exception&) {
      raw->tasks.abandon();
      const std::lock_guard<std::mutex> lock(raw->mutex);
      raw->has_failed = true;
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), num_tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([shared, guarded] {
      {
        const std::lock_guard<std::mutex> lock(shared->mutex);
        if (shared->is_closed) return;
        ++shared->inside;
      }
      guarded();
      const std::lock_guard<std::mutex> lock(shared->mutex);
      if (--shared->inside == 0) shared->all_left.notify_all();
    });
  }
  guarded();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->is_closed = true;
  shared->all_left.wait(lock, [&] { return shared->inside == 0; });
  if (shared->has_failed) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted,
                           "jax_flash: no memory left for the scratch of a CPU kernel");
  }
  return xla::ffi::Error::Success();
}

}  // namespace jax_flash
