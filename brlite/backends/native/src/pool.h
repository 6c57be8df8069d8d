// Threads that compute one step together: the caller and some others, which wait for work in between.
//
// All meet at barriers, some 150 to 300 times a step. Whoever waits spins for a moment and then
// sleeps: on cores that others use too, threads that spin or yield for long keep the very thread from running that they
// wait for.
#pragma once

#include <stdint.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace brlite {

// A number that threads wait for to change; those of other processes too if it is `SHARED`.
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

// Where processes meet, in memory that they share. All zeros is a new one.
class Meeting {
 public:
    // Returns when `num_ranks` processes are here, or when it has ended.
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
    // Only while nobody waits.
    void set_num_threads(int num_threads) { num_threads_ = num_threads; }
    // Returns when all threads are here; the last of them does `before` while the others still wait.
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

// What a job took: from its beginning to its end, and of all threads together the processor time in which they did not
// wait.
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
    std::unique_ptr<Signal[]> jobs_;  // by thread: count its jobs; -1 ends it
    Signal last_done_;                // counts the jobs that all have done
    alignas(64) std::atomic<int32_t> num_busy_{0};
    std::atomic<int64_t> busy_nanoseconds_{0};
    std::vector<std::thread> threads_;
};

}  // namespace brlite
