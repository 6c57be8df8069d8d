#include "memory.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

#include "brlite.h"

namespace brlite {

namespace {

constexpr size_t LARGE_PAGE = 2u << 20;

size_t rounded_size(size_t num_bytes) {
    const size_t page = num_bytes >= LARGE_PAGE ? LARGE_PAGE : 4096;
    return (num_bytes + page - 1) / page * page;
}

}  // namespace

Memory::Memory(size_t num_bytes) : data_((uint8_t*)brlite_allocate(num_bytes)), num_bytes_(num_bytes) {
    if (!data_) throw std::bad_alloc();
}

Memory::~Memory() { brlite_release(data_, num_bytes_); }

}  // namespace brlite

extern "C" {

void* brlite_allocate(size_t num_bytes) {
    const size_t size = brlite::rounded_size(num_bytes);
    const size_t slack = size >= brlite::LARGE_PAGE ? brlite::LARGE_PAGE : 0;  // to start at a huge page
    void* memory = mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    if (!slack) return memory;
    uint8_t* first = (uint8_t*)(((uintptr_t)memory + slack - 1) / slack * slack);
    const size_t before = first - (uint8_t*)memory;
    if (before) munmap(memory, before);
    if (slack > before) munmap(first + size, slack - before);
#if defined(MADV_HUGEPAGE)
    madvise(first, size, MADV_HUGEPAGE);
#endif
    return first;
}

void brlite_release(void* memory, size_t num_bytes) {
    if (memory) munmap(memory, brlite::rounded_size(num_bytes));
}

// Four interleaved multiplicative hashes. Swapped bytes and added or removed zeros change the checksum.
uint64_t brlite_checksum(void* to, const void* from, size_t num_bytes) {
    const uint64_t prime = 0x9E3779B97F4A7C15u;
    uint64_t sums[4] = {num_bytes, ~num_bytes, prime, ~prime};
    const uint8_t* bytes = (const uint8_t*)from;
    for (size_t i = 0; i < num_bytes; i += 32) {
        uint64_t words[4] = {0, 0, 0, 0};
        const size_t size = num_bytes - i < 32 ? num_bytes - i : 32;
        memcpy(words, bytes + i, size);
        if (to) memcpy((uint8_t*)to + i, words, size);
        for (int lane = 0; lane < 4; lane++) {
            sums[lane] = (sums[lane] ^ words[lane]) * prime;
            sums[lane] ^= sums[lane] >> 29;
        }
    }
    uint64_t all = 0;
    for (int lane = 0; lane < 4; lane++) all = (all ^ sums[lane]) * prime, all ^= all >> 32;
    return all;
}

}  // extern "C"
