#include "pool.hpp"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace fastokd {
namespace {

struct Job {
  TaskFunction function;
  void* context;
  int64_t tasks;
  int workers;
  std::atomic<int64_t> next{0};

  void work(int worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) function(context, worker, task);
  }
};

// Threads sleep until there is an open job. A caller never waits for a thread that has not joined its job.
class Pool {
 public:
  explicit Pool(pid_t pid) : owner(pid) {}

  bool try_run(Job& job) {
    std::unique_lock<std::mutex> busy(one_caller_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    grow(job.workers - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      tickets_ = 0;
      ++generation_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    left_.wait(lock, [&] { return joined_ == 0; });
    return true;
  }

  const pid_t owner;

 private:
  void grow(int helpers) {
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // Continue with fewer threads.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    uint64_t seen = 0;
    for (;;) {
      wake_.wait(lock, [&] { return job_ && tickets_ + 1 < job_->workers && seen != generation_; });
      seen = generation_;
      Job& job = *job_;
      const int worker = ++tickets_;
      ++joined_;
      lock.unlock();
      job.work(worker);
      lock.lock();
      if (--joined_ == 0) left_.notify_one();
    }
  }

  std::mutex one_caller_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int helpers_ = 0;
  int tickets_ = 0;
  int joined_ = 0;
};

std::atomic<Pool*> current{nullptr};

// The pool of this process. A forked child inherits the parent's pool without its threads, so it creates another.
Pool* pool() {
  const pid_t pid = getpid();
  Pool* found = current.load(std::memory_order_acquire);
  if (found && found->owner == pid) return found;
  Pool* made = new (std::nothrow) Pool(pid);
  if (!made) return nullptr;
  if (current.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return made;
  delete made;
  return found;
}

}  // namespace

void parallel(int workers, int64_t tasks, TaskFunction function, void* context) {
  Job job{function, context, tasks, workers};
  if (workers > 1 && tasks > 1)
    if (Pool* shared = pool())
      if (shared->try_run(job)) return;
  job.work(0);
}

}  // namespace fastokd
