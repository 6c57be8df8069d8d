#include "pool.h"

#include <sched.h>

#include "pause.h"

namespace brlite {

namespace {

constexpr int SPINS_AT_BARRIER = 4000;  // some 40 us
constexpr int SPINS_FOR_WORK = 2000;    // then it yields, and after so many yields it sleeps
constexpr int YIELDS_FOR_WORK = 200;

template <class Done>
bool spin_until(Done done, int num_spins) {
    for (int i = 0; i < num_spins; i++) {
        if (done()) return true;
        pause();
    }
    return done();
}

}  // namespace

void Barrier::wait() {
    const int32_t generation = generation_.load(std::memory_order_relaxed);
    if (num_waiting_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
        num_waiting_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        return;
    }
    const auto is_open = [&] { return generation_.load(std::memory_order_acquire) != generation; };
    if (spin_until(is_open, SPINS_AT_BARRIER)) return;
    while (!is_open()) sched_yield();
}

Pool::Pool(int num_threads) : num_threads_(num_threads) {
    barrier_.reset(num_threads);
    try {
        for (int thread = 1; thread < num_threads; thread++) threads_.emplace_back([this, thread] { serve(thread); });
    } catch (...) {  // the system has no more: those that run must end before they are forgotten
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        job_.store(-1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(int)>& work) {
    work_ = &work;
    num_busy_.store(num_threads_ - 1, std::memory_order_relaxed);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        job_.store((job_.load(std::memory_order_relaxed) + 1) & 0x7fffffff, std::memory_order_release);
    }
    wake_.notify_all();
    work(0);
    const auto is_done = [&] { return num_busy_.load(std::memory_order_acquire) == 0; };
    if (spin_until(is_done, SPINS_AT_BARRIER)) return;
    while (!is_done()) sched_yield();
}

void Pool::serve(int thread) {
    int32_t seen = 0;
    while (wait_for_work(seen)) {
        seen = job_.load(std::memory_order_acquire);
        (*work_)(thread);
        num_busy_.fetch_sub(1, std::memory_order_release);
    }
}

// True when there is a job newer than `seen`; false when there will be none.
bool Pool::wait_for_work(int32_t seen) {
    const auto has_changed = [&] { return job_.load(std::memory_order_acquire) != seen; };
    bool is_there = spin_until(has_changed, SPINS_FOR_WORK);
    for (int i = 0; i < YIELDS_FOR_WORK && !is_there; i++) {
        sched_yield();
        is_there = has_changed();
    }
    if (!is_there) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, has_changed);
    }
    return job_.load(std::memory_order_acquire) >= 0;
}

}  // namespace brlite
