// Threads that compute one step together: the caller, and others that wait for work between steps.
//
// A step has 150 to 300 barriers. A waiting thread spins for a moment, then yields, then sleeps. Longer spinning would
// be harmful on cores that other programs use: the spinning thread can keep the core from the thread that it waits for.
#pragma once

#include <stdint.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace brlite {

// A number whose change threads can wait for. With `SHARED` the threads may be of several processes.
template <bool SHARED>
class BasicSignal {
 public:
    int32_t get() const { return value_.load(std::memory_order_acquire); }
    void set(int32_t value);
    // Returns when the number is no longer `old`.
    void wait_from(int32_t old);

 private:
    alignas(64) std::atomic<int32_t> value_{0};
    std::atomic<int32_t> num_sleeping_{0};
};

using Signal = BasicSignal<false>;

// A barrier of processes, in memory that they share. All zeros is the initial state.
class Meeting {
 public:
    // Returns when `num_ranks` processes have called it, or after `end`.
    void wait(int num_ranks);
    void end();
    bool has_ended() const { return has_ended_.load() != 0; }

 private:
    BasicSignal<true> generation_;
    alignas(64) std::atomic<int32_t> num_waiting_{0};
    std::atomic<int32_t> has_ended_{0};
};

class Barrier {
 public:
    explicit Barrier(int num_threads) : num_threads_(num_threads) {}
    // To be called only while no thread waits.
    void set_num_threads(int num_threads) { num_threads_ = num_threads; }
    // Returns when all threads have called it. The last one calls `before` while the others still wait.
    template <class Before>
    void wait(Before before) {
        const int32_t generation = generation_.get();
        if (num_waiting_.fetch_add(1, std::memory_order_acq_rel) < num_threads_ - 1)
            return generation_.wait_from(generation);
        num_waiting_.store(0, std::memory_order_relaxed);
        before();
        generation_.set((generation + 1) & INT32_MAX);
    }
    void wait() {
        wait([] {});
    }

 private:
    int num_threads_;
    alignas(64) std::atomic<int32_t> num_waiting_{0};
    Signal generation_;
};

// Time of a job: wall time, and the processor time of all threads together without waiting.
struct JobTime {
    double seconds;
    double busy_seconds;
};

class Pool {
 public:
    explicit Pool(int num_threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }
    Barrier& barrier() { return barrier_; }
    // Call `work(thread)` on the first `num_threads` threads, this one as thread 0; return when all are done. Not
    // reentrant.
    JobTime run(const std::function<void(int)>& work, int num_threads);

 private:
    void serve(int thread);
    void do_share(int thread);
    void stop();

    const int num_threads_;
    Barrier barrier_;
    const std::function<void(int)>* work_ = nullptr;
    std::unique_ptr<Signal[]> jobs_;  // by thread: the number of its jobs so far; -1 ends it
    Signal last_done_;                // the number of jobs that all threads have finished
    alignas(64) std::atomic<int32_t> num_busy_{0};
    std::atomic<int64_t> busy_nanoseconds_{0};
    std::vector<std::thread> threads_;
};

}  // namespace brlite
