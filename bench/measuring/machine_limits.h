// What this machine can do at best: bytes read from memory and multiply-adds of each kind, a second. The steps of a
// model are measured against these. Knows no models and keeps nothing: threads and memory are gone when a call returns.
//
// Rates are of the time that a thread has the processor: what else runs here takes none of it. BRLITE_ISA=avx2 (or
// generic) measures what processors without AVX-512 (or without AVX2) have.
//
// Sums live in twelve local variables of one function for each instruction: in an array, or shared by two loops, GCC
// keeps them in memory, and the peak comes out half as high.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace brlite {

enum MeasuredKind {
    MEASURE_READ,   // bytes
    MEASURE_FP32,   // multiply-adds of float32
    MEASURE_INT16,  // multiply-adds of int16 into int32: what int8 weights times int16 activations take
    MEASURE_BF16,   // multiply-adds of bfloat16 into float32
    MEASURE_INT8,   // multiply-adds of int8: with VNNI into int32, with AVX2 (for int4 codes) into int16; else of int16
    NUM_MEASURED_KINDS,
};

namespace limits {

constexpr int MAX_THREADS = 1024;
constexpr double ROUND_SECONDS = 0.05;     // the best round counts: what else runs here only ever slows one down
constexpr size_t READ_BYTES = 512u << 20;  // of all threads together: far more than caches hold
constexpr size_t PIECE_BYTES = 4u << 20;
constexpr size_t PAGE_BYTES = 2u << 20;
constexpr long LOOPS = 4000;  // between two looks at the clock

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

inline double thread_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

template <class Work>
double rate_of_round(const Work& work) {
    double done = 0, spent = 0;
    for (const double begin = thread_seconds(); spent < ROUND_SECONDS; spent = thread_seconds() - begin) done += work();
    return done / spent;
}

// Whether a processor of the instruction set that is measured has a feature of this processor's.
inline bool is_measured(const char* isa) {
    const char* wanted = getenv("BRLITE_ISA");
    if (!wanted || !*wanted) return true;
    const char* const order[] = {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};
    for (const char* each : order) {
        if (strcmp(each, isa) == 0) return true;
        if (strcmp(each, wanted) == 0) return false;
    }
    return true;
}

// Calls `work(thread)`, which returns how much it did, again and again on every thread for a round; returns the rate
// of the best of the rounds that fit into `seconds`.
template <class Work>
double best_rate(int num_threads, double seconds, const Work& work) {
    double best = 0;
    Clock::time_point start = Clock::now();
    do {
        std::vector<double> rates(num_threads);
        std::atomic<int> num_waiting{num_threads};
        std::vector<std::thread> threads;
        for (int i = 0; i < num_threads; i++) {
            threads.emplace_back([&, i] {
                num_waiting--;
                while (num_waiting > 0) std::this_thread::yield();
                rates[i] = rate_of_round([&] { return work(i); });
            });
        }
        for (std::thread& thread : threads) thread.join();
        double sum = 0;
        for (double rate : rates) sum += rate;
        if (sum > best) best = sum;
    } while (seconds_since(start) < seconds);
    return best;
}

// Results go here, so that no compiler finds them useless.
inline void keep(uint64_t value) {
    static std::atomic<uint64_t> sink;
    sink.fetch_xor(value, std::memory_order_relaxed);
}

// ---- Reading ----------------------------------------------------------------------------------------------------

typedef uint64_t (*Reader)(const uint8_t* bytes, size_t count);  // count is a multiple of 256

inline uint64_t read_generic(const uint8_t* bytes, size_t count) {
    const uint64_t* words = (const uint64_t*)bytes;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i < count / 8; i += 4) a ^= words[i], b ^= words[i + 1], c ^= words[i + 2], d ^= words[i + 3];
    return a ^ b ^ c ^ d;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) inline uint64_t read_avx2(const uint8_t* bytes, size_t count) {
    const __m256i* at = (const __m256i*)bytes;
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i < count / 32; i += 4) {
        a = _mm256_xor_si256(a, _mm256_loadu_si256(at + i));
        b = _mm256_xor_si256(b, _mm256_loadu_si256(at + i + 1));
        c = _mm256_xor_si256(c, _mm256_loadu_si256(at + i + 2));
        d = _mm256_xor_si256(d, _mm256_loadu_si256(at + i + 3));
    }
    __m256i all = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    return (uint64_t)_mm_cvtsi128_si64(_mm256_castsi256_si128(all));
}

__attribute__((target("avx512f"))) inline uint64_t read_avx512(const uint8_t* bytes, size_t count) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i < count; i += 256) {
        a = _mm512_xor_si512(a, _mm512_loadu_si512(bytes + i));
        b = _mm512_xor_si512(b, _mm512_loadu_si512(bytes + i + 64));
        c = _mm512_xor_si512(c, _mm512_loadu_si512(bytes + i + 128));
        d = _mm512_xor_si512(d, _mm512_loadu_si512(bytes + i + 192));
    }
    __m512i all = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    uint64_t parts[8];
    _mm512_storeu_si512(parts, all);
    return parts[0];
}

#endif

inline Reader best_reader() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (is_measured("avx512") && __builtin_cpu_supports("avx512f")) return read_avx512;
    if (is_measured("avx2") && __builtin_cpu_supports("avx2")) return read_avx2;
#endif
    return read_generic;
}

// A thread's part of the memory to read, in large pages where the system has them, first touched by that thread.
class ReadBuffer {
 public:
    explicit ReadBuffer(size_t size) : size_(size), bytes_((uint8_t*)aligned_alloc(PAGE_BYTES, size)) {
        if (bytes_ == nullptr) return;
#if defined(__linux__)
        madvise(bytes_, size, MADV_HUGEPAGE);
#endif
        for (size_t i = 0; i < size; i += 64) bytes_[i] = (uint8_t)(i >> 6);
    }
    ReadBuffer(const ReadBuffer&) = delete;
    ~ReadBuffer() { free(bytes_); }
    bool is_there() const { return bytes_ != nullptr; }
    const uint8_t* next_piece() {
        at_ = at_ + PIECE_BYTES < size_ ? at_ + PIECE_BYTES : 0;
        return bytes_ + at_;
    }

 private:
    size_t size_, at_ = 0;
    uint8_t* bytes_;
};

// ---- Multiplying ------------------------------------------------------------------------------------------------

typedef double (*Multiplier)();  // returns the multiply-adds that it did

typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

#if defined(__x86_64__)
#define BRLITE_REGISTER "+x"
#elif defined(__aarch64__)
#define BRLITE_REGISTER "+w"
#else
#define BRLITE_REGISTER "+m"
#endif

// `asm` without instructions: the compiler must believe that `x` is another value now. So it neither merges sums nor
// takes a product out of the loop.
#define BRLITE_CHANGED(x) __asm__ volatile("" : BRLITE_REGISTER(x));
#define BRLITE_TWELVE(DO) DO(s0) DO(s1) DO(s2) DO(s3) DO(s4) DO(s5) DO(s6) DO(s7) DO(s8) DO(s9) DO(s10) DO(s11)

// A function that does ADD to each of twelve sums in turn; ADD(sum) is an expression of `sum`, `a` and `b`.
#define BRLITE_MULTIPLIER(NAME, TARGET, SUM, A, B, ADD) \
    TARGET inline double NAME() {                       \
        auto a = A, b = B;                              \
        SUM s0{}, s1{}, s2{}, s3{}, s4{}, s5{};         \
        SUM s6{}, s7{}, s8{}, s9{}, s10{}, s11{};       \
        BRLITE_TWELVE(BRLITE_CHANGED)                   \
        for (long loop = 0; loop < LOOPS; loop++) {     \
            BRLITE_CHANGED(b)                           \
            BRLITE_TWELVE(ADD)                          \
        }                                               \
        BRLITE_TWELVE(BRLITE_CHANGED)                   \
        return (double)LOOPS * 12 * sizeof(SUM) / 4;    \
    }

#define BRLITE_ADD(sum) sum = sum + a * b;
BRLITE_MULTIPLIER(multiply_fp32_generic, , Floats4, (Floats4{} + 0.5f), (Floats4{} + 0.25f), BRLITE_ADD)
BRLITE_MULTIPLIER(multiply_int16_generic, , Ints4, (Ints4{} + 3), (Ints4{} + 5), BRLITE_ADD)
#undef BRLITE_ADD

#if defined(__x86_64__)

#define BRLITE_TARGET(NAMES) __attribute__((target(NAMES)))

#define BRLITE_ADD(sum) sum = _mm256_fmadd_ps(a, b, sum);
BRLITE_MULTIPLIER(multiply_fp32_avx2, BRLITE_TARGET("avx2,fma"), __m256, _mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f),
                  BRLITE_ADD)
#undef BRLITE_ADD

#define BRLITE_ADD(sum) sum = _mm512_fmadd_ps(a, b, sum);
BRLITE_MULTIPLIER(multiply_fp32_avx512, BRLITE_TARGET("avx512f"), __m512, _mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f),
                  BRLITE_ADD)
#undef BRLITE_ADD

// The instructions below multiply pairs: two multiply-adds for each sum of 32 bits. Where adding takes a second one,
// each sum is asked for at once: else GCC multiplies ahead, for which there are not enough registers.
#define BRLITE_PAIRS(SINGLE, PAIRS) \
    inline double PAIRS() { return 2 * SINGLE(); }

#define BRLITE_ADD(sum)                                   \
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); \
    BRLITE_CHANGED(sum) BRLITE_CHANGED(b)
BRLITE_MULTIPLIER(pairs_int16_avx2, BRLITE_TARGET("avx2"), __m256i, _mm256_set1_epi16(3), _mm256_set1_epi16(5),
                  BRLITE_ADD)
#undef BRLITE_ADD

#define BRLITE_ADD(sum)                                      \
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); \
    BRLITE_CHANGED(sum) BRLITE_CHANGED(b)
BRLITE_MULTIPLIER(quads_int8_avx2, BRLITE_TARGET("avx2"), __m256i, _mm256_set1_epi8(3), _mm256_set1_epi8(5), BRLITE_ADD)
#undef BRLITE_ADD

#define BRLITE_ADD(sum)                                   \
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); \
    BRLITE_CHANGED(sum) BRLITE_CHANGED(b)
BRLITE_MULTIPLIER(pairs_int16_avx512, BRLITE_TARGET("avx512f,avx512bw"), __m512i, _mm512_set1_epi16(3),
                  _mm512_set1_epi16(5), BRLITE_ADD)
#undef BRLITE_ADD

// asm: the intrinsics of these make GCC copy sums, which takes a third of the rate on an Ice Lake.
#define BRLITE_ADD(sum) __asm__ volatile("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
BRLITE_MULTIPLIER(pairs_int16_vnni, BRLITE_TARGET("avx512f,avx512bw,avx512vnni"), __m512i, _mm512_set1_epi16(3),
                  _mm512_set1_epi16(5), BRLITE_ADD)
#undef BRLITE_ADD

#define BRLITE_ADD(sum) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
BRLITE_MULTIPLIER(pairs_bf16_avx512, BRLITE_TARGET("avx512f,avx512bw,avx512bf16"), __m512, _mm512_set1_epi16(0x3f00),
                  _mm512_set1_epi16(0x3e80), BRLITE_ADD)
#undef BRLITE_ADD

#define BRLITE_ADD(sum) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
BRLITE_MULTIPLIER(quads_int8_vnni, BRLITE_TARGET("avx512f,avx512bw,avx512vnni"), __m512i, _mm512_set1_epi8(3),
                  _mm512_set1_epi8(5), BRLITE_ADD)
#undef BRLITE_ADD

inline double multiply_int8_vnni() { return 4 * quads_int8_vnni(); }
inline double multiply_int8_avx2() { return 4 * quads_int8_avx2(); }
BRLITE_PAIRS(pairs_int16_avx2, multiply_int16_avx2)
BRLITE_PAIRS(pairs_int16_avx512, multiply_int16_avx512)
BRLITE_PAIRS(pairs_int16_vnni, multiply_int16_vnni)
BRLITE_PAIRS(pairs_bf16_avx512, multiply_bf16_avx512)

#undef BRLITE_PAIRS
#undef BRLITE_TARGET

#endif

#undef BRLITE_MULTIPLIER
#undef BRLITE_TWELVE
#undef BRLITE_CHANGED
#undef BRLITE_REGISTER

// The fastest way of this processor. Without an instruction for bfloat16 its numbers are widened to float32.
inline Multiplier best_multiplier(int kind) {
    const bool is_integer = kind == MEASURE_INT16 || kind == MEASURE_INT8;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool is_wide =
        is_measured("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    const bool has_vnni = is_measured("avx512_vnni") && __builtin_cpu_supports("avx512vnni");
    const bool has_bf16 = is_measured("avx512_bf16") && __builtin_cpu_supports("avx512bf16");
    const bool has_avx2 = is_measured("avx2") && __builtin_cpu_supports("avx2");
    if (kind == MEASURE_INT8 && is_wide && has_vnni) return multiply_int8_vnni;
    if (is_integer && is_wide) return has_vnni ? multiply_int16_vnni : multiply_int16_avx512;
    if (kind == MEASURE_INT8 && !is_wide && has_avx2) return multiply_int8_avx2;
    if (is_integer && has_avx2) return multiply_int16_avx2;
    if (kind == MEASURE_BF16 && is_wide && has_bf16) return multiply_bf16_avx512;
    if (!is_integer && is_wide) return multiply_fp32_avx512;
    if (!is_integer && has_avx2 && __builtin_cpu_supports("fma")) return multiply_fp32_avx2;
#endif
    return is_integer ? multiply_int16_generic : multiply_fp32_generic;
}

}  // namespace limits

// Bytes a second that `num_threads` threads read from memory, each its own part. 0 if the memory cannot be had.
inline double read_bytes_per_second(int num_threads, double seconds) {
    using namespace limits;
    if (num_threads < 1 || num_threads > MAX_THREADS) return 0;
    const size_t part = (READ_BYTES / num_threads / PIECE_BYTES + 1) * PIECE_BYTES;
    std::vector<std::unique_ptr<ReadBuffer>> buffers(num_threads);
    std::vector<std::thread> threads;
    for (auto& buffer : buffers) threads.emplace_back([&buffer, part] { buffer.reset(new ReadBuffer(part)); });
    for (std::thread& thread : threads) thread.join();
    for (const auto& buffer : buffers) {
        if (!buffer->is_there()) return 0;
    }
    const Reader read = best_reader();
    return best_rate(num_threads, seconds, [&](int thread) {
        keep(read(buffers[thread]->next_piece(), PIECE_BYTES));
        return (double)PIECE_BYTES;
    });
}

// Multiply-adds of `kind` a second, of all threads together. 0 for a kind that there is not.
inline double multiply_adds_per_second(int kind, int num_threads, double seconds) {
    if (kind <= MEASURE_READ || kind >= NUM_MEASURED_KINDS) return 0;
    if (num_threads < 1 || num_threads > limits::MAX_THREADS) return 0;
    const limits::Multiplier multiply = limits::best_multiplier(kind);
    return limits::best_rate(num_threads, seconds, [multiply](int) { return multiply(); });
}

// Either of the two: bytes for MEASURE_READ, else multiply-adds. What the C interface hands on.
inline double measure(int kind, int num_threads, double seconds) {
    if (kind == MEASURE_READ) return read_bytes_per_second(num_threads, seconds);
    return multiply_adds_per_second(kind, num_threads, seconds);
}

}  // namespace brlite
