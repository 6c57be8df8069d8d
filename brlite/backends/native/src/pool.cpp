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

constexpr int SPINS = 2000;   // some 20 us
constexpr int YIELDS = 2000;  // some 500 us where nobody else wants the core
constexpr int WAITS_APART = 256;
constexpr std::chrono::microseconds LONG_YIELD(100);
constexpr int64_t MAX_SPIN_NANOSECONDS = 100000;
constexpr int32_t END = -1;

thread_local int64_t polled_nanoseconds = 0;  // of this thread's processor time, since it was last set to 0

int64_t nanoseconds_of(clockid_t clock) {
    timespec now{};
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Gives the core away until `is_over`, as long as nobody takes it: polling so is quicker than being woken. A core that
// somebody took does not come back for milliseconds, so for the next waits its thread sleeps at once, and the system
// puts it before the others when it is woken.
template <class IsOver>
bool yield_until(IsOver is_over) {
    thread_local int num_apart = 0;
    if (num_apart > 0) return num_apart--, false;
    for (int i = 0; i < YIELDS; i++) {
        const auto start = std::chrono::steady_clock::now();
        sched_yield();
        if (std::chrono::steady_clock::now() - start > LONG_YIELD) num_apart = WAITS_APART;
        if (is_over()) return true;
        if (num_apart > 0) return false;
    }
    return false;
}

// Sleep unless the number has changed already.
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
    value_.store(value);  // in one order with num_sleeping_: either this sees who sleeps, or they see the new number
    if (num_sleeping_.load() > 0) wake_all(value_, SHARED);
}

template <bool SHARED>
void BasicSignal<SHARED>::wait_from(int32_t old) {
    if (get() != old) return;
    const int64_t start = nanoseconds_of(CLOCK_MONOTONIC);
    for (int i = 0; i < SPINS && get() == old; i++) pause();
    // Longer only where the core was lost meanwhile, which took no time of this thread.
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

// Whoever comes after the end has seen it before it could wait: the end is noted before the number is changed.
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
    } catch (...) {  // the system has no more: those that run must end before they are forgotten
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
