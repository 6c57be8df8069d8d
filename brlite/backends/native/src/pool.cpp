#include "pool.h"

#include <limits.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "brlite.h"
#include "pause.h"

namespace brlite {

namespace {

constexpr int SPINS = 2000;               // about 20 us
constexpr int YIELDS = 2000;              // about 500 us if no other thread wants the core
constexpr int WAITS_WITHOUT_YIELD = 256;  // after a core was lost
// Longer than what a server computes between two steps, shorter than the time that a program gets a core for.
constexpr std::chrono::microseconds LONG_YIELD(1000);
constexpr int64_t MAX_SPIN_NANOSECONDS = 100000;
constexpr int32_t END = -1;

thread_local int64_t polled_nanoseconds = 0;  // processor time that this thread spent waiting, since it was set to 0

int64_t nanoseconds_of(clockid_t clock) {
    timespec now{};
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Yields the core in a loop until `is_over`. As long as no other thread wants the core, this reacts faster than a futex
// wake-up. Once a yield took long, another program has taken the core, and may keep it for milliseconds. For its next
// waits the thread then sleeps at once: Linux gives a woken thread the core before threads that were running.
template <class IsOver>
bool yield_until(IsOver is_over) {
    thread_local int num_to_skip = 0;
    if (num_to_skip > 0) return num_to_skip--, false;
    for (int i = 0; i < YIELDS; i++) {
        const auto start = std::chrono::steady_clock::now();
        sched_yield();
        if (std::chrono::steady_clock::now() - start > LONG_YIELD) num_to_skip = WAITS_WITHOUT_YIELD;
        if (is_over()) return true;
        if (num_to_skip > 0) return false;
    }
    return false;
}

// Sleeps, unless the number is no longer `old`. May return early.
void sleep_while(std::atomic<int32_t>& number, int32_t old, bool is_shared) {
#if defined(__linux__)
    syscall(SYS_futex, &number, is_shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
    (void)is_shared;
    if (number.load() == old) usleep(50);
#endif
}

void wake_all(std::atomic<int32_t>& number, bool is_shared) {
#if defined(__linux__)
    syscall(SYS_futex, &number, is_shared ? FUTEX_WAKE : FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    (void)number, (void)is_shared;
#endif
}

}  // namespace

template <bool SHARED>
void BasicSignal<SHARED>::set(int32_t value) {
    value_.store(value);  // sequentially consistent: this thread sees the sleeper, or the sleeper the value
    if (num_sleeping_.load() > 0) wake_all(value_, SHARED);
}

template <bool SHARED>
void BasicSignal<SHARED>::wait_from(int32_t old) {
    if (get() != old) return;
    const int64_t start = nanoseconds_of(CLOCK_MONOTONIC);
    for (int i = 0; i < SPINS && get() == old; i++) pause();
    // More than this can only be time in which the thread had no core.
    polled_nanoseconds += std::min(nanoseconds_of(CLOCK_MONOTONIC) - start, MAX_SPIN_NANOSECONDS);
    if (get() != old) return;
    const int64_t used = nanoseconds_of(CLOCK_THREAD_CPUTIME_ID);
    if (!yield_until([&] { return get() != old; })) {
        num_sleeping_.fetch_add(1);
        while (value_.load() == old) sleep_while(value_, old, SHARED);
        num_sleeping_.fetch_sub(1);
    }
    polled_nanoseconds += nanoseconds_of(CLOCK_THREAD_CPUTIME_ID) - used;
}

template class BasicSignal<false>;
template class BasicSignal<true>;

// `end` sets has_ended_ before it changes the generation: a rank that arrives later sees it and does not wait.
void Meeting::wait(int num_ranks) {
    if (has_ended()) return;
    const int32_t generation = generation_.get();
    if (num_waiting_.fetch_add(1) < num_ranks - 1) return generation_.wait_from(generation);
    num_waiting_.store(0);
    generation_.set((generation + 1) & INT_MAX);
}

void Meeting::end() {
    has_ended_.store(1);
    generation_.set((generation_.get() + 1) & INT_MAX);
}

Pool::Pool(int num_threads) : num_threads_(num_threads), barrier_(num_threads), jobs_(new Signal[(size_t)num_threads]) {
    try {
        for (int thread = 1; thread < num_threads; thread++) threads_.emplace_back([this, thread] { serve(thread); });
    } catch (...) {  // the system gives no more threads: end those that run
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    for (size_t thread = 1; thread <= threads_.size(); thread++) jobs_[thread].set(END);
    for (std::thread& thread : threads_) thread.join();
}

JobTime Pool::run(const std::function<void(int)>& work, int num_threads) {
    const int64_t start = nanoseconds_of(CLOCK_MONOTONIC);
    const int32_t done = last_done_.get();
    work_ = &work;
    barrier_.set_num_threads(num_threads);
    busy_nanoseconds_.store(0, std::memory_order_relaxed);
    num_busy_.store(num_threads, std::memory_order_relaxed);
    for (int thread = 1; thread < num_threads; thread++) jobs_[thread].set((jobs_[thread].get() + 1) & INT_MAX);
    do_share(0);
    last_done_.wait_from(done);
    return {(double)(nanoseconds_of(CLOCK_MONOTONIC) - start) * 1e-9, (double)busy_nanoseconds_.load() * 1e-9};
}

void Pool::do_share(int thread) {
    const int64_t used = nanoseconds_of(CLOCK_THREAD_CPUTIME_ID);
    polled_nanoseconds = 0;
    (*work_)(thread);
    busy_nanoseconds_ += nanoseconds_of(CLOCK_THREAD_CPUTIME_ID) - used - polled_nanoseconds;
    if (num_busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) last_done_.set((last_done_.get() + 1) & INT_MAX);
}

void Pool::serve(int thread) {
    for (int32_t seen = 0;;) {
        jobs_[thread].wait_from(seen);
        seen = jobs_[thread].get();
        if (seen == END) return;
        do_share(thread);
    }
}

}  // namespace brlite

extern "C" {

size_t brlite_meeting_bytes(void) { return sizeof(brlite::Meeting); }
void brlite_end_meeting(brlite_meeting* meeting) { ((brlite::Meeting*)meeting)->end(); }

}  // extern "C"
