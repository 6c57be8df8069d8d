// Threads that compute one step together: the caller and some others, which wait for work in between.
//
// Between two operations all meet at a barrier, some 300 times a step. Waiting spins first, then gives the processor
// away: on cores that others use too, barriers that only spin cost ten times as much.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace brlite {

class Barrier {
 public:
    void reset(int num_threads) { num_threads_ = num_threads; }
    void wait();

 private:
    int num_threads_ = 1;
    alignas(64) std::atomic<int32_t> num_waiting_{0};
    alignas(64) std::atomic<int32_t> generation_{0};
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
    bool wait_for_work(int32_t seen);

    const int num_threads_;
    Barrier barrier_;
    const std::function<void(int)>* work_ = nullptr;
    alignas(64) std::atomic<int32_t> job_{0};  // counts the jobs; -1 ends the threads
    alignas(64) std::atomic<int32_t> num_busy_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

}  // namespace brlite
