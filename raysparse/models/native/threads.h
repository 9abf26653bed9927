// Work on several threads: on those that PyTorch has, where it says how (`raysparse_use_pool`), else on new ones.
//
// PyTorch's threads go on running for some milliseconds after each of its operations, waiting for the next one. New
// threads share their cores with them: with two threads on two cores a sampling step of U-ViT took .88 of one thread's
// time, and 64 sketches of ChiroDiff 1.4 times as long. Like PyTorch's own operations they hang in a process that was
// forked after PyTorch has used its threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// OpenMP's entry, GOMP_parallel: function(data) on so many threads, the caller's among them.
using Pool = void (*)(void (*)(void*), void*, unsigned, unsigned);
Pool pool = nullptr;

// work(number of the thread), on this thread and others, no more than there are parts; perhaps on fewer.
template <class Work>
void on_threads(int threads, int64_t parts, const Work& work) {
  if (threads <= 1 || parts <= 1) return work(0);
  if (pool) {
    struct Job {
      const Work& work;
      std::atomic<int> started;
    } job{work, {0}};
    // As many as PyTorch has, whatever there is to do: a team of another size ends threads, or makes them.
    pool([](void* data) { Job* all = (Job*)data; all->work(all->started++); }, &job, (unsigned)threads, 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int thread = 1; thread < threads && thread < parts; ++thread) others.emplace_back(work, thread);
  } catch (const std::system_error&) {  // the system gives no more threads: those there are do it all
  }
  work(0);
  for (std::thread& other : others) other.join();
}

// work(number, thread) for each of `count` parts; which thread does which is left to chance.
template <class Work>
void over_threads(int64_t count, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  on_threads(threads, count, [&](int thread) {
    for (int64_t number; (number = next++) < count;) work(number, thread);
  });
}

}  // namespace

extern "C" void raysparse_use_pool(void* function) { pool = (Pool)function; }
