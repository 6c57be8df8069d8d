// Threads that compute one step together: the caller and some others, which wait for work in between.
//
// Between two operations all meet at a barrier, some 300 times a step. Whoever waits spins for a moment and then
// sleeps: on cores that others use too, threads that spin or yield for long keep the very thread from running that they
// wait for.
#pragma once

#include <stdint.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace brlite {

// A number that threads wait for to change.
class Signal {
 public:
    int32_t get() const { return value_.load(std::memory_order_acquire); }
    void set(int32_t value);
    // Returns when the number is no longer `old`.
    void wait_from(int32_t old);

 private:
    alignas(64) std::atomic<int32_t> value_{0};
    std::atomic<int32_t> num_sleeping_{0};
};

class Barrier {
 public:
    explicit Barrier(int num_threads) : num_threads_(num_threads) {}
    void wait();

 private:
    const int num_threads_;
    alignas(64) std::atomic<int32_t> num_waiting_{0};
    Signal generation_;
};

class Pool {
 public:
    explicit Pool(int num_threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }
    Barrier& barrier() { return barrier_; }
    // Call `work(thread)` on every thread, this one as thread 0; return when all are done. Not reentrant.
    void run(const std::function<void(int)>& work);

 private:
    void serve(int thread);
    void stop();

    const int num_threads_;
    Barrier barrier_;
    const std::function<void(int)>* work_ = nullptr;
    Signal job_;        // counts the jobs; -1 ends the threads
    Signal last_done_;  // the last job that all have done
    alignas(64) std::atomic<int32_t> num_busy_{0};
    std::vector<std::thread> threads_;
};

}  // namespace brlite
